# SPDX-License-Identifier: Apache-2.0
"""Entry point of the command line: parse, then load and run the command.

JAX, flax and the compilers are imported after the arguments are parsed, so that
`--help` and a bad option answer at once. This is the only place that does so.
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
    commands = importlib.import_module("remattools.cli.commands")
    code: int = commands.run_command(args)
    return code
