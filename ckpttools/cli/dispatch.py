# SPDX-License-Identifier: Apache-2.0
"""Load a command and run it; what it raises becomes a message and an exit code."""

import argparse
import importlib
import sys
from collections.abc import Callable

from ..errors import CheckpointError, StepDamagedError, UntrustedStepError
from . import output
from .parser import EXIT_FAILED, EXIT_INTERRUPTED

_MODULES = {
    "run_commands": ("ls", "show", "verify", "prune", "pin", "unpin", "record", "repair"),
    "array_commands": ("diff", "adopt", "export", "import", "mirror"),
}


def run_command(args: argparse.Namespace) -> int:
    """Run the command of parsed arguments.

    Args:
        args: What `parser.build_parser` returned for the command line.

    Returns:
        One of the exit codes in `parser`.

    Raises:
        BrokenPipeError: If the reader of the output has left.
    """
    try:
        code = load_command(args.command)(args)
        sys.stdout.flush()
        return code
    except StepDamagedError as error:
        damaged = [f"\n    damaged leaf: {name}" for name in error.leaves]
        damaged += [f"\n    damaged file: {name}" for name in error.files]
        # From a shell, suggest a command for this run, unless the error has its own fix.
        usual = error.fix == error.default_fix and not isinstance(error, UntrustedStepError)
        commands = f"ckpttools verify {args.run} names all damage; ckpttools repair puts back what it can."
        fix = commands if usual else error.fix
        output.print_error(f"{args.run}: {error.what}{''.join(damaged)}\n  why: {error.why}\n  fix: {fix}")
        return EXIT_FAILED
    except CheckpointError as error:
        output.print_error(str(error))
        return EXIT_FAILED
    except BrokenPipeError:
        raise  # It is the output: what a mirror's store raises is a `MirrorError`.
    except OSError as error:
        output.print_error(f"{error.filename or args.run} cannot be read or written: {error.strerror or error}.")
        return EXIT_FAILED
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


def load_command(name: str) -> Callable[[argparse.Namespace], int]:
    """Import the module of a command and return the function that runs it."""
    module = next(module for module, names in _MODULES.items() if name in names)
    function = "run_pin" if name == "unpin" else f"run_{name}"
    command: Callable[[argparse.Namespace], int] = getattr(importlib.import_module(f"ckpttools.cli.{module}"), function)
    return command
