# SPDX-License-Identifier: Apache-2.0
"""What each command of `remattools` does: call one library function and return what to print.

No other logic lives here, so a notebook can do whatever a shell can. Nothing in a rule
file is executed.
"""

import argparse
import contextlib
import dataclasses
import os
import pathlib
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ..analysis.check import check
from ..analysis.compare import compare
from ..analysis.explain_call import explain
from ..analysis.measure import measure
from ..analysis.plot import check_path
from ..analysis.residuals import residuals
from ..analysis.ruled_call import find_model, make_rules, use_rules
from ..analysis.timeline import timeline
from ..compiler.cache import Cache, open_user_cache
from ..errors import MeasureError, RematError
from ..planner.plan import plan
from ..terminal.native_output import redirect_native_stdout
from ..terminal.progress import CompileLog, log_to_stderr, open_progress
from ..transform.explain import ExplanationRow, describe
from .output import CommandResult, print_result
from .parser import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_NO, EXIT_OK
from .subject import Subject, load_subject


def run_command(args: argparse.Namespace) -> int:
    """Run a parsed command, print its result and return its exit code."""
    try:
        _check_outputs(args)
        # What the user's own code and native libraries print is not part of the answer, which a script reads.
        with redirect_native_stdout(), contextlib.redirect_stdout(sys.stderr), log_to_stderr():
            subject = load_subject(args.factory, allow_model=_is_static(args))
            result = _COMMANDS[args.command](args, subject)
        print_result(result, as_json=args.json)
        for path, write in result.files:
            write(path)
    except (RematError, OSError) as error:
        print(f"remattools: {error}", file=sys.stderr)
        return EXIT_FAILED
    except KeyboardInterrupt as interrupt:
        if str(interrupt):
            print(f"remattools: {interrupt}.", file=sys.stderr)
        return EXIT_INTERRUPTED
    except Exception as error:  # raised by the user's own code: with its traceback, and never the code for "no"
        traceback.print_exception(error)
        print(f"remattools: {args.factory} raised {type(error).__name__}, see above.", file=sys.stderr)
        return EXIT_FAILED
    return result.code


def _check_outputs(args: argparse.Namespace) -> None:
    """Refuse files that cannot be written before the first long compile."""
    plot_path = getattr(args, "plot", None)
    if plot_path is not None:
        check_path(plot_path)
    for path in (plot_path, getattr(args, "csv", None), getattr(args, "out", None)):
        if path is not None and not path.resolve().parent.is_dir():
            raise MeasureError(
                what=f"{path} cannot be written: the directory {path.parent} does not exist.",
                why="otherwise the command would fail after its last compile.",
                fix=f"mkdir -p {path.parent}",
            )


def _is_static(args: argparse.Namespace) -> bool:
    """Whether the command only looks at a model's modules and calls nothing."""
    return args.command == "explain" and not args.names


def _run_explain(args: argparse.Namespace, subject: Subject) -> CommandResult:
    model = find_model(subject.fn, subject.args)
    rules = None if args.rules is None else make_rules(model, args.rules)
    if not args.names:
        explanation = explain(model, rules)
    elif subject.inputs is not None:
        explanation = explain(model, rules, names=True, args=subject.inputs)
    else:
        explanation = explain(subject.fn, *subject.args, rules=rules, names=True)
    return CommandResult(EXIT_OK, [_convert_row(row) for row in explanation.rows], explanation)


def _run_residuals(args: argparse.Namespace, subject: Subject) -> CommandResult:
    with _apply_rules(args, subject) as subject:
        report = residuals(subject.fn, *subject.args)
    return CommandResult(EXIT_OK, report.as_dict(), report)


def _run_timeline(args: argparse.Namespace, subject: Subject) -> CommandResult:
    with _apply_rules(args, subject) as subject:
        result = timeline(subject.fn, *subject.args, differentiate=not args.as_is)
    return CommandResult(EXIT_OK, result.as_dict(), result, files=_select_files((args.plot, result.plot)))


def _run_measure(args: argparse.Namespace, subject: Subject) -> CommandResult:
    with _apply_rules(args, subject) as subject, open_progress(None) as show:
        show(f"compiling for {args.target or 'the default device'}")
        measurement = measure(
            subject.fn,
            *subject.args,
            target=args.target,
            differentiate=not args.as_is,
            run=args.run,
            cache=_open_cache(args),
        )
    return CommandResult(EXIT_OK if measurement.fits else EXIT_NO, measurement.as_dict(), measurement)


def _run_compare(args: argparse.Namespace, subject: Subject) -> CommandResult:
    candidates = _parse_candidates(args.rules)
    with open_progress(None) as show:
        log = CompileLog(show)
        result = compare(
            subject.fn,
            *subject.args,
            candidates=candidates,
            target=args.target,
            differentiate=not args.as_is,
            run=args.run,
            cache=_open_cache(args),
            progress=lambda name, number, count: log.start(name, remaining=count - number - 1),
        )
    code = EXIT_OK if all(row.measurement.fits for row in result.rows) else EXIT_NO
    csv = (args.csv, lambda path: path.write_text(result.to_csv()))
    return CommandResult(code, result.as_dict(), result, files=_select_files(csv, (args.plot, result.plot)))


def _parse_candidates(specs: Sequence[str]) -> dict[str, str | None]:
    """Return rules by name from `NAME=RULES`, files and policies; the model as it is comes first."""
    candidates: dict[str, str | None] = {"none": None}
    for spec in specs:
        name, separator, rules = spec.partition("=")
        if not separator or os.path.exists(spec):
            name, rules = pathlib.Path(spec).stem, spec
        if name in candidates:
            raise MeasureError(
                what=f"--rules {spec} is a second candidate named {name!r}.",
                why="the table would show only one of the two; 'none' is the model without new rules.",
                fix=f"name it: --rules other={rules}",
            )
        candidates[name] = rules
    return candidates


def _run_check(args: argparse.Namespace, subject: Subject) -> CommandResult:
    with open_progress(None) as show:
        show("compiling with and without the rules")
        report = check(
            subject.fn,
            *subject.args,
            rules=args.rules,
            differentiate=not args.as_is,
            target=args.target,
            cache=_open_cache(args),
        )
    return CommandResult(EXIT_OK if report.ok else EXIT_NO, report.as_dict(), report)


def _run_plan(args: argparse.Namespace, subject: Subject) -> CommandResult:
    result = plan(
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
    )
    files = _select_files((args.out, result.write), (args.plot, result.plot))
    return CommandResult(EXIT_OK, result.as_dict(), result, result.to_toml() if args.out is None else "", files)


_COMMANDS: dict[str, Callable[[argparse.Namespace, Subject], CommandResult]] = {
    "explain": _run_explain,
    "residuals": _run_residuals,
    "timeline": _run_timeline,
    "measure": _run_measure,
    "compare": _run_compare,
    "plan": _run_plan,
    "check": _run_check,
}


def _select_files(
    *pairs: tuple[pathlib.Path | None, Callable[[pathlib.Path], object]],
) -> tuple[tuple[pathlib.Path, Callable[[pathlib.Path], object]], ...]:
    return tuple((path, write) for path, write in pairs if path is not None)


def _parse_budget(text: str | None) -> float | int | str | None:
    """Parse numbers as numbers: a fraction has a point, as in Python."""
    if text is None:
        return None
    try:
        return float(text) if "." in text else int(text)
    except ValueError:
        return text


@contextlib.contextmanager
def _apply_rules(args: argparse.Namespace, subject: Subject) -> Iterator[Subject]:
    if args.rules is None:
        yield subject
        return
    model = find_model(subject.fn, subject.args)
    with use_rules(model, make_rules(model, args.rules), subject.fn) as fn:
        yield dataclasses.replace(subject, fn=fn)


def _open_cache(args: argparse.Namespace) -> Cache | None:
    """Open the user's cache, unless the environment names another or the command asks for none."""
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
