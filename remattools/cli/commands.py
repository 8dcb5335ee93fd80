# SPDX-License-Identifier: Apache-2.0
"""`remattools explain|residuals|measure|compare|check|timeline|plan module:factory`.

Entry point. Parses, calls one library function, prints, returns an exit code; so a
notebook can do whatever a shell can. Nothing is executed from a rule file.
"""

import argparse
import contextlib
import dataclasses
import json
import math
import os
import pathlib
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rich.console import Console

from ..analysis.check import check
from ..analysis.compare import compare, find_model, make_rules, use_rules
from ..analysis.compile import measure
from ..analysis.residuals import residuals
from ..analysis.timeline import timeline
from ..compiler.cache import open_user_cache
from ..errors import MeasureError, RematError
from ..planner.plan import plan
from ..transform.explain import ExplanationRow, describe, explain
from .subject import Subject, load_subject

# argparse also exits with 2 on bad usage.
OK, NO, CANNOT = 0, 1, 2
EXIT_INTERRUPTED = 130  # as a shell reports a program that Ctrl-C ended


def build_parser() -> argparse.ArgumentParser:
    """All commands with their options."""
    parser = argparse.ArgumentParser(
        prog="remattools",
        description="What a model's activations cost, and what rules do about it.",
        epilog="Exit codes: 0 done, 1 the answer is no (does not fit, does not work), 2 cannot be done.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")

    def add_command(name: str, run: Any, description: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=description, description=description)
        added.set_defaults(execute=run)
        added.add_argument(
            "factory", help="module:function or file.py:function, returning (fn, args) or (model, inputs)"
        )
        added.add_argument("--json", action="store_true", help="machine-readable output")
        return added

    explained = add_command("explain", _run_explain, "say what rules do to each module")
    _add_rules_option(explained)
    explained.add_argument("--names", action="store_true", help="list what save= and offload= can name (for models)")
    _add_rules_option(add_command("residuals", _run_residuals, "list what lives from forward to backward, by module"))
    walked = add_command("timeline", _run_timeline, "say what is alive when, and what fills the peak")
    _add_rules_option(walked)
    _add_as_is_option(walked)
    walked.add_argument("--plot", type=pathlib.Path, help="draw it into a PNG or SVG file")
    measured = add_command("measure", _run_measure, "compile for a target and give the compiler's own figures")
    _add_rules_option(measured)
    _add_target_options(measured)
    _add_as_is_option(measured)
    measured.add_argument("--run", action="store_true", help="also run it and take the time")
    compared = add_command("compare", _run_compare, "measure several rules side by side")
    compared.add_argument(
        "--rules", action="append", default=[], metavar="[NAME=]RULES", help="rule file or policy; repeat for more"
    )
    _add_target_options(compared)
    _add_as_is_option(compared)
    compared.add_argument("--run", action="store_true", help="also run each and take the time")
    compared.add_argument("--csv", type=pathlib.Path, help="write the figures into this file")
    compared.add_argument("--plot", type=pathlib.Path, help="draw time against memory into a PNG or SVG file")
    planned = add_command("plan", _run_plan, "find rules that keep a memory budget with the least recomputation")
    planned.add_argument("--budget", help="12GiB, bytes, a fraction of the plain model with a point (0.5, 1.0), or fit")
    planned.add_argument("--of", choices=("peak", "temp"), default="peak", help="what the budget is about")
    planned.add_argument(
        "--max-cycles", type=float, help="find the least memory within this time instead, in cycles of a step; 250e6"
    )
    planned.add_argument("--max-compiles", type=int, default=8, help="the most programs to compile")
    planned.add_argument("--time-limit", type=float, metavar="SECONDS", help="begin no compile after this time")
    planned.add_argument("-o", "--out", type=pathlib.Path, help="write the rules into this file")
    planned.add_argument("--plot", type=pathlib.Path, help="draw time against memory into a PNG or SVG file")
    _add_target_options(planned)
    _add_as_is_option(planned)
    checked = add_command("check", _run_check, "say whether rules do what they were to do")
    _add_rules_option(checked)
    _add_target_options(checked)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; `argv` excludes the program's name, so that tests call it directly."""
    args = build_parser().parse_args(argv)
    try:
        _check_outputs(args)
        # What the user's own code prints is no part of the answer, which a script reads.
        with contextlib.redirect_stdout(sys.stderr):
            answer: _Result = args.execute(args, load_subject(args.factory, allow_model=_is_static(args)))
        _print_result(answer, as_json=args.json)
        for path, write in answer.files:
            write(path)
    except RematError as error:
        print(f"remattools: {error}", file=sys.stderr)
        return CANNOT
    except OSError as error:
        print(f"remattools: {error}", file=sys.stderr)
        return CANNOT
    except KeyboardInterrupt as stopped:
        if str(stopped):
            print(f"remattools: {stopped}.", file=sys.stderr)
        return EXIT_INTERRUPTED
    except Exception as error:  # the user's own code, traced: with its traceback, and never the code for "no"
        traceback.print_exception(error)
        print(f"remattools: {args.factory} raised {type(error).__name__}, see above.", file=sys.stderr)
        return CANNOT
    return answer.code


@dataclasses.dataclass(frozen=True)
class _Result:
    """What a command found.

    Attributes:
        code: The exit code.
        data: For `--json`.
        text: For people, as text, or as a table that follows the terminal's width.
        extra_text: What follows the text.
        files: What to write after it was said, so that a full disk does not cost the answer.
    """

    code: int
    data: Any
    text: Any
    extra_text: str = ""
    files: tuple[tuple[pathlib.Path, Callable[[pathlib.Path], Any]], ...] = ()


def _print_result(result: _Result, *, as_json: bool) -> None:
    if sys.stdout is None:  # closed by who started this: the exit code is the answer
        return
    if as_json:
        text = json.dumps(_replace_nonfinite(result.data), indent=2, allow_nan=False)
    elif sys.stdout.isatty() and hasattr(result.text, "__rich__"):
        Console(no_color=True, highlight=False).print(result.text)
        text = result.extra_text
    else:
        text = "\n\n".join(filter(None, (str(result.text), result.extra_text)))
    try:
        print(text, end="\n" if text else "", flush=True)
    except BrokenPipeError:  # as of `| head`: who reads has seen enough, and Python is not to complain at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _replace_nonfinite(data: Any) -> Any:
    """JSON has no NaN and no infinity."""
    if isinstance(data, dict):
        return {key: _replace_nonfinite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_replace_nonfinite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def _check_outputs(args: argparse.Namespace) -> None:
    """Refuse files that cannot be written before the first long compile."""
    plot = getattr(args, "plot", None)
    if plot is not None:
        plot.check(plot)
    for path in (plot, getattr(args, "csv", None), getattr(args, "out", None)):
        if path is not None and not path.resolve().parent.is_dir():
            raise MeasureError(
                what=f"{path} cannot be written: there is no folder {path.parent}.",
                why="it would be found out after the last compile.",
                fix=f"mkdir -p {path.parent}",
            )


def _add_rules_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rules", help="rule file in TOML, or a policy for every block")


def _add_target_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--target", help="cpu, gpu, tpu:v5e:2x2, ...; by default JAX's own device")
    parser.add_argument("--no-cache", action="store_true", help="compile again what was compiled before")


def _add_as_is_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--as-is", action="store_true", help="the function is a whole step: take no gradient of it")


def _is_static(args: argparse.Namespace) -> bool:
    """Whether the command looks at a model's modules and calls nothing."""
    return args.command == "explain" and not args.names


def _run_explain(args: argparse.Namespace, subject: Subject) -> _Result:
    model = find_model(subject.fn, subject.args)
    rules = None if args.rules is None else make_rules(model, args.rules)
    explanation = explain(model, rules, names=args.names, args=subject.inputs)
    return _Result(OK, [_convert_row(row) for row in explanation.rows], explanation)


def _run_residuals(args: argparse.Namespace, subject: Subject) -> _Result:
    with _apply_rules(args, subject):
        report = residuals(subject.fn, *subject.args)
    return _Result(OK, report.as_dict(), report)


def _run_timeline(args: argparse.Namespace, subject: Subject) -> _Result:
    with _apply_rules(args, subject):
        walked = timeline(subject.fn, *subject.args, differentiate=not args.as_is)
    return _Result(OK, walked.as_dict(), walked, files=_select_files((args.plot, walked.plot)))


def _run_measure(args: argparse.Namespace, subject: Subject) -> _Result:
    with _apply_rules(args, subject), _show_progress(f"compiling for {args.target or 'the default device'}"):
        measured = measure(
            subject.fn,
            *subject.args,
            target=args.target,
            differentiate=not args.as_is,
            run=args.run,
            cache=_open_cache(args),
        )
    return _Result(OK if measured.fits else NO, measured.as_dict(), measured)


def _run_compare(args: argparse.Namespace, subject: Subject) -> _Result:
    candidates = _parse_candidates(args.rules)
    with _show_progress("comparing") as status:
        result = compare(
            subject.fn,
            *subject.args,
            candidates=candidates,
            target=args.target,
            differentiate=not args.as_is,
            run=args.run,
            cache=_open_cache(args),
            progress=lambda name, number, count: status.update(f"{name} ({number + 1} of {count})"),
        )
    code = OK if all(row.measurement.fits for row in result.rows) else NO
    csv = (args.csv, lambda path: path.write_text(result.to_csv()))
    return _Result(code, result.as_dict(), result, files=_select_files(csv, (args.plot, result.plot)))


def _parse_candidates(specs: Sequence[str]) -> dict[str, Any]:
    """Names with rules, from `NAME=RULES`, a file or a policy; the model as it is comes first."""
    candidates: dict[str, Any] = {"none": None}
    for text in specs:
        name, separator, rules = text.partition("=")
        if not separator or os.path.exists(text):
            name, rules = pathlib.Path(text).stem, text
        if name in candidates:
            raise MeasureError(
                what=f"--rules {text} is a second candidate of the name {name!r}.",
                why="one of the two would be left out of the table; 'none' is the model without new rules.",
                fix=f"name it: --rules other={rules}",
            )
        candidates[name] = rules
    return candidates


def _run_check(args: argparse.Namespace, subject: Subject) -> _Result:
    with _show_progress("compiling with and without the rules"):
        report = check(subject.fn, *subject.args, rules=args.rules, target=args.target, cache=_open_cache(args))
    return _Result(OK if report.ok else NO, report.as_dict(), report)


def _run_plan(args: argparse.Namespace, subject: Subject) -> _Result:
    with _show_progress("tracing") as status:
        found = plan(
            subject.fn,
            *subject.args,
            budget=_parse_budget(args.budget),
            of=args.of,
            max_cycles=args.max_cycles,
            differentiate=not args.as_is,
            target=args.target,
            max_compiles=args.max_compiles,
            time_limit_s=args.time_limit,
            cache=_open_cache(args),
            progress=status.update,
        )
    rules = (args.out, lambda path: path.write_text(found.to_toml()))
    more = found.to_toml() if args.out is None else ""
    return _Result(OK, found.as_dict(), found, more, _select_files(rules, (args.plot, found.plot)))


def _select_files(*pairs: tuple[pathlib.Path | None, Any]) -> Any:
    return tuple((path, write) for path, write in pairs if path is not None)


def _parse_budget(text: str | None) -> float | int | str | None:
    """Numbers as numbers: a fraction has a point, as in Python."""
    if text is None:
        return None
    try:
        return float(text) if "." in text else int(text)
    except ValueError:
        return text


@contextlib.contextmanager
def _apply_rules(args: argparse.Namespace, subject: Subject) -> Iterator[None]:
    if args.rules is None:
        yield
        return
    model = find_model(subject.fn, subject.args)
    with use_rules(model, make_rules(model, args.rules)):
        yield


def _show_progress(message: str) -> Any:
    """Something that moves while a compiler works, where somebody looks."""
    return Console(stderr=True).status(message)


def _open_cache(args: argparse.Namespace) -> Any:
    """The user's cache, unless the environment names another or the command wants none."""
    if args.no_cache:
        os.environ.pop("REMATTOOLS_CACHE", None)
        return None
    return None if os.environ.get("REMATTOOLS_CACHE") else open_user_cache()


def _convert_row(row: ExplanationRow) -> dict[str, Any]:
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
