# SPDX-License-Identifier: Apache-2.0
"""Entry point of the command `ckpttools`: parse, then load what runs the command.

The rest is imported after the arguments were parsed, so that `--help` and a bad option answer at once. Whatever a
command does, a function of `ckpttools` does in a notebook.
"""

import importlib
from collections.abc import Sequence

from .parser import build_parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: Arguments without the program's name; None takes them from `sys.argv`.

    Returns:
        One of the exit codes in `parser`.
    """
    args = build_parser().parse_args(argv)
    code: int = importlib.import_module("ckpttools.cli.dispatch").run_command(args)
    return code
