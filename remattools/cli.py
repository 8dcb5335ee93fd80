# SPDX-License-Identifier: Apache-2.0
"""`remattools explain|residuals|measure|compare|check|timeline|plan module:factory`.

Entry point. Parses, calls one library function, prints, returns an exit code; so a
notebook can do whatever a shell can. Nothing is executed from a rule file.
"""

import argparse
import contextlib
import json
import os
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Console

from .errors import RematError
from .measure.cache import user_cache
from .measure.check import check
from .measure.compare import compare, model_of, rules_for, under
from .measure.compile import measure
from .measure.factory import Subject, load_subject
from .measure.residuals import residuals
from .measure.timeline import timeline
from .plan.planner import plan
from .transform.explain import ExplanationRow, describe, explain

# argparse also exits with 2 on bad usage.
OK, NO, CANNOT = 0, 1, 2


def build_parser() -> argparse.ArgumentParser:
    """All commands with their options."""
    parser = argparse.ArgumentParser(
        prog="remattools",
        description="What a model's activations cost, and what rules do about it.",
        epilog="Exit codes: 0 done, 1 the answer is no (does not fit, does not work), 2 cannot be done.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")

    def command(name: str, run: Any, text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text)
        added.set_defaults(execute=run)
        added.add_argument(
            "factory", help="module:function or file.py:function, returning (fn, args) or (model, inputs)"
        )
        added.add_argument("--json", action="store_true", help="machine-readable output")
        return added

    explained = command("explain", _explain, "say what rules do to each module")
    _rules_option(explained)
    explained.add_argument("--names", action="store_true", help="list what save= and offload= can name (for models)")
    _rules_option(command("residuals", _residuals, "list what lives from forward to backward, by module"))
    walked = command("timeline", _timeline, "say what is alive when, and what fills the peak")
    _rules_option(walked)
    _as_is_option(walked)
    walked.add_argument("--plot", type=pathlib.Path, help="draw it into a PNG or SVG file")
    measured = command("measure", _measure, "compile for a target and give the compiler's own figures")
    _rules_option(measured)
    _target_options(measured)
    _as_is_option(measured)
    measured.add_argument("--run", action="store_true", help="also run it and take the time")
    compared = command("compare", _compare, "measure several rules side by side")
    compared.add_argument(
        "--rules", action="append", default=[], metavar="[NAME=]RULES", help="rule file or policy; repeat for more"
    )
    _target_options(compared)
    _as_is_option(compared)
    compared.add_argument("--run", action="store_true", help="also run each and take the time")
    compared.add_argument("--csv", type=pathlib.Path, help="write the figures into this file")
    compared.add_argument("--plot", type=pathlib.Path, help="draw time against memory into a PNG or SVG file")
    planned = command("plan", _plan, "find rules that keep a memory budget with the least recomputation")
    planned.add_argument("--budget", help="12GiB, a fraction of the plain model (0.5), or fit")
    planned.add_argument("--of", choices=("peak", "temp"), default="peak", help="what the budget is about")
    planned.add_argument("--max-cycles", type=float, help="find the least memory within this time instead")
    planned.add_argument("--max-compiles", type=int, default=8, help="the most programs to compile")
    planned.add_argument("--time-limit", type=float, metavar="SECONDS", help="begin no compile after this time")
    planned.add_argument("-o", "--out", type=pathlib.Path, help="write the rules into this file")
    planned.add_argument("--plot", type=pathlib.Path, help="draw time against memory into a PNG or SVG file")
    _target_options(planned)
    checked = command("check", _check, "say whether rules do what they were to do")
    _rules_option(checked)
    _target_options(checked)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; `argv` excludes the program's name, so that tests call it directly."""
    args = build_parser().parse_args(argv)
    try:
        code: int = args.execute(args, load_subject(args.factory))
    except RematError as error:
        print(f"remattools: {error}", file=sys.stderr)
        return CANNOT
    return code


def _rules_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rules", help="rule file in TOML, or a policy for every block")


def _target_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--target", help="cpu, gpu, tpu:v5e:2x2, ...; by default JAX's own device")
    parser.add_argument("--no-cache", action="store_true", help="compile again what was compiled before")


def _as_is_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--as-is", action="store_true", help="the function is a whole step: take no gradient of it")


def _explain(args: argparse.Namespace, subject: Subject) -> int:
    model = model_of(subject.fn, subject.args)
    rules = None if args.rules is None else rules_for(model, args.rules)
    explanation = explain(model, rules, names=args.names, args=subject.inputs)
    _show(args, [_row(row) for row in explanation.rows], str(explanation))
    return OK


def _residuals(args: argparse.Namespace, subject: Subject) -> int:
    with _ruled(args, subject):
        report = residuals(subject.fn, *subject.args)
    _show(args, report.as_dict(), str(report))
    return OK


def _timeline(args: argparse.Namespace, subject: Subject) -> int:
    with _ruled(args, subject):
        walked = timeline(subject.fn, *subject.args, differentiate=not args.as_is)
    if args.plot is not None:
        walked.plot(args.plot)
    _show(args, walked.as_dict(), str(walked))
    return OK


def _measure(args: argparse.Namespace, subject: Subject) -> int:
    with _ruled(args, subject), _working(f"compiling for {args.target or 'the default device'}"):
        measured = measure(
            subject.fn,
            *subject.args,
            target=args.target,
            differentiate=not args.as_is,
            run=args.run,
            cache=_cache(args),
        )
    _show(args, measured.as_dict(), str(measured))
    return OK if measured.fits else NO


def _compare(args: argparse.Namespace, subject: Subject) -> int:
    candidates: dict[str, Any] = {"none": None}
    for text in args.rules:
        name, separator, rules = text.partition("=")
        candidates[name if separator else pathlib.Path(text).stem] = rules if separator else text
    with _working("comparing") as status:
        result = compare(
            subject.fn,
            *subject.args,
            candidates=candidates,
            target=args.target,
            differentiate=not args.as_is,
            run=args.run,
            cache=_cache(args),
            progress=lambda name, number, count: status.update(f"{name} ({number + 1} of {count})"),
        )
    if args.csv is not None:
        args.csv.write_text(result.to_csv())
    if args.plot is not None:
        result.plot(args.plot)
    print(result.to_json() if args.json else result)
    return OK if all(row.measurement.fits for row in result.rows) else NO


def _check(args: argparse.Namespace, subject: Subject) -> int:
    with _working("compiling with and without the rules"):
        report = check(subject.fn, *subject.args, rules=args.rules, target=args.target, cache=_cache(args))
    _show(args, report.as_dict(), str(report))
    return OK if report.ok else NO


def _plan(args: argparse.Namespace, subject: Subject) -> int:
    with _working("tracing") as status:
        found = plan(
            subject.fn,
            *subject.args,
            budget=_budget(args.budget),
            of=args.of,
            max_cycles=args.max_cycles,
            target=args.target,
            max_compiles=args.max_compiles,
            time_limit_s=args.time_limit,
            cache=_cache(args),
            progress=status.update,
        )
    if args.out is not None:
        args.out.write_text(found.to_toml())
    if args.plot is not None:
        found.plot(args.plot)
    _show(args, found.as_dict(), f"{found}\n\n{found.to_toml()}" if args.out is None else str(found))
    return OK


def _budget(text: str | None) -> float | int | str | None:
    """Numbers as numbers: a fraction has a point, as in Python."""
    if text is None:
        return None
    try:
        return float(text) if "." in text else int(text)
    except ValueError:
        return text


@contextlib.contextmanager
def _ruled(args: argparse.Namespace, subject: Subject) -> Iterator[None]:
    if args.rules is None:
        yield
        return
    model = model_of(subject.fn, subject.args)
    with under(model, rules_for(model, args.rules)):
        yield


def _working(text: str) -> Any:
    """Something that moves while a compiler works, where somebody looks."""
    return Console(stderr=True).status(text)


def _cache(args: argparse.Namespace) -> Any:
    """The user's cache, unless the environment names another or the command wants none."""
    if args.no_cache:
        os.environ.pop("REMATTOOLS_CACHE", None)
        return None
    return None if os.environ.get("REMATTOOLS_CACHE") else user_cache()


def _show(args: argparse.Namespace, data: Any, text: str) -> None:
    print(json.dumps(data, indent=2) if args.json else text)


def _row(row: ExplanationRow) -> dict[str, Any]:
    return {
        "path": row.path,
        "aliases": row.aliases,
        "class": row.cls,
        "action": None if row.action is None else describe(row.action),
        "rule": row.rule,
        "shadowed": row.shadowed,
        "shares": row.shares,
        "values": [{"name": value.label, "index": value.index, "bytes": value.bytes} for value in row.values],
        "warnings": row.warnings,
    }
