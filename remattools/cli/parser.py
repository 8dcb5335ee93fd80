# SPDX-License-Identifier: Apache-2.0
"""What the command line `remattools` accepts and which exit codes it returns.

Imports the standard library only, so that `remattools --help` answers at once.
"""

import argparse
import pathlib

EXIT_OK, EXIT_NO = 0, 1
EXIT_FAILED = 2  # argparse also exits with 2 on bad usage
EXIT_INTERRUPTED = 130  # as a shell reports a program that Ctrl-C ended


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of all commands with their options."""
    parser = argparse.ArgumentParser(
        prog="remattools",
        description="Show what a model's activations cost, and what remat rules change about it.",
        epilog="Exit codes: 0 done, 1 the answer is no (runs out of memory, rules do not help), 2 the command failed.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")

    def add_command(name: str, summary: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.")
        added.add_argument(
            "factory", help="module:function or file.py:function, returning (fn, args) or (model, inputs)"
        )
        added.add_argument("--json", action="store_true", help="print JSON")
        return added

    explain = add_command("explain", "show which rule governs each module, and what it does")
    _add_rules_option(explain)
    explain.add_argument("--names", action="store_true", help="list the values that save= and offload= can name")
    _add_rules_option(add_command("residuals", "list the values saved from forward to backward, by module"))
    timeline = add_command("timeline", "show which values are live when, and what fills the peak")
    _add_rules_option(timeline)
    _add_as_is_option(timeline)
    timeline.add_argument("--plot", type=pathlib.Path, help="draw it into a PNG, SVG or PDF file")
    measure = add_command("measure", "compile for a target and show the compiler's memory and cost report")
    _add_rules_option(measure)
    _add_target_options(measure)
    _add_as_is_option(measure)
    measure.add_argument("--run", action="store_true", help="also run it and time a step")
    compare = add_command("compare", "measure several rules side by side")
    compare.add_argument(
        "--rules", action="append", default=[], metavar="[NAME=]RULES", help="rule file or policy; repeat for more"
    )
    _add_target_options(compare)
    _add_as_is_option(compare)
    compare.add_argument("--run", action="store_true", help="also run each and time a step")
    compare.add_argument("--csv", type=pathlib.Path, help="write the measurements into this file")
    compare.add_argument("--plot", type=pathlib.Path, help="draw time against memory into a PNG, SVG or PDF file")
    _add_plan_options(add_command("plan", "find rules that keep a memory budget with the least recomputation"))
    check = add_command("check", "report whether rules do what they are meant to do")
    _add_rules_option(check)
    _add_target_options(check)
    _add_as_is_option(check)
    return parser


def _add_plan_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--budget", help="12GiB, bytes, a fraction of the plain model's memory with a point (0.5, 1.0), or fit"
    )
    parser.add_argument("--of", choices=("peak", "temp"), default="peak", help="which memory the budget limits")
    parser.add_argument(
        "--max-cycles", type=float, help="find the least memory within this step time instead, in cycles; 250e6"
    )
    parser.add_argument("--max-compiles", type=int, default=8, help="compile at most this many programs")
    parser.add_argument("--time-limit", type=float, metavar="SECONDS", help="start no compile after this time")
    parser.add_argument("-o", "--out", type=pathlib.Path, help="write the rules into this file")
    parser.add_argument("--plot", type=pathlib.Path, help="draw time against memory into a PNG, SVG or PDF file")
    _add_target_options(parser)
    _add_as_is_option(parser)


def _add_rules_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rules", help="rule file in TOML, or a policy for every block")


def _add_target_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--target", help="cpu, gpu, tpu:v5e:2x2, ...; by default JAX's default device")
    parser.add_argument("--no-cache", action="store_true", help="compile again, even if the cache has a measurement")


def _add_as_is_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--as-is", action="store_true", help="the function is a whole train step: do not differentiate it"
    )
