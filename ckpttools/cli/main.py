# SPDX-License-Identifier: Apache-2.0
"""Entry point of the command `ckpttools`: parse, then load what runs the command.

The rest is imported after the arguments were parsed, so that `--help` and a bad option answer at once. Whatever a
command does, a function of `ckpttools` does in a notebook.
"""

import importlib
import os
import sys
from collections.abc import Sequence

from .parser import EXIT_PIPE_CLOSED, build_parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: Arguments without the program's name; None takes them from `sys.argv`.

    Returns:
        One of the exit codes in `parser`.
    """
    _replace_closed_streams()
    try:
        args = build_parser().parse_args(argv)
        code: int = importlib.import_module("ckpttools.cli.dispatch").run_command(args)
        return code
    except BrokenPipeError:
        # `ckpttools verify run | head -1`: whether all is well was not reported completely, so the code is not 0.
        return EXIT_PIPE_CLOSED
    finally:
        _discard_unwritten_output()


def _discard_unwritten_output() -> None:
    """Drop what could not be written: Python would try again at exit, print an error and exit with another code."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            descriptor = os.open(os.devnull, os.O_WRONLY)
            os.dup2(descriptor, stream.fileno())
            os.close(descriptor)


def _replace_closed_streams() -> None:
    """Let nothing be printed where a shell has closed a stream, such as `ckpttools verify run >&-`.

    Otherwise the next file that is opened would get the number of that stream, and with it what is printed there.
    """
    if all((sys.stdin, sys.stdout, sys.stderr)):
        return
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
    sys.stdin = sys.stdin or os.fdopen(0, closefd=False)
    sys.stdout = sys.stdout or os.fdopen(1, "w", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", closefd=False)
