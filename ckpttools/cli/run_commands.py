# SPDX-License-Identifier: Apache-2.0
"""The commands that read no arrays: `ls`, `show`, `verify`, `prune`, `pin`, `unpin`, `record`,
`repair`.

They import no JAX, so that they answer at once. Only `verify` loads the reader of the arrays, after it has compared the
files, to read each leaf back.
"""

import argparse
import dataclasses
import itertools

from ..errors import SpecError
from ..spec.retention import Best, EveryNSteps, Latest, Retention, Union
from ..spec.spec import CheckpointSpec
from ..store.run_directory import RunDirectory
from ..tools.ls import ls
from ..tools.prune import empty_quarantine, prune
from ..tools.record import record
from ..tools.repair import repair
from ..tools.show import show
from ..tools.verify import verify
from . import output
from .arguments import locate_steps, parse_one_address, parse_pairs, require_whole_run
from .parser import EXIT_NO, EXIT_OK


def run_ls(args: argparse.Namespace) -> int:
    """List the steps of a run."""
    listing = ls(args.run)
    rows = list(listing)
    if args.verify:
        with output.show_progress("verifying") as progress:
            report = verify(args.run, progress=progress)
        # Two branches may have the same number.
        health = {(step.step, step.branch): step for step in report.steps}
        rows = [
            dataclasses.replace(row, state=f"{row.state}, {health[row.step, row.branch].state}")
            if row.state in ("committed", "superseded") and (row.step, row.branch) in health
            else row
            for row in rows
        ]
    if args.json:
        output.print_json([dataclasses.asdict(row) for row in rows])
    else:
        output.print_steps(rows)
    if not rows:
        output.print_error(listing.found)
    return EXIT_OK if rows and (not args.verify or report.ok) else EXIT_NO


def run_show(args: argparse.Namespace) -> int:
    """Show the tree of one step."""
    address = parse_one_address(args.run, args.step)
    shown = show(address.location, address.step)
    if args.json:
        output.print_json(shown.as_dict())
    else:
        output.print_tree(shown)
    return EXIT_OK


def run_verify(args: argparse.Namespace) -> int:
    """Read every byte of a run or step and name what is damaged."""
    address = parse_one_address(args.run, args.step)
    with output.show_progress("verifying") as progress:
        report = verify(address.location, address.step, progress=progress)
    output.print_report(args, report.as_dict(), str(report))
    return EXIT_OK if report.ok else EXIT_NO


def run_prune(args: argparse.Namespace) -> int:
    """Delete the steps that a retention does not keep."""
    run, keep = require_whole_run(args.run), _parse_retention(args)
    verdicts = None if keep is None else prune(run, keep, dry_run=args.dry_run)
    emptied = empty_quarantine(run, dry_run=args.dry_run) if args.quarantine else None
    if args.json:
        plain = [
            {"step": each.step.step, "superseded": each.step.superseded, "keep": each.keep, "reason": each.reason}
            for each in verdicts or ()
        ]
        output.print_json({"dry_run": args.dry_run, "steps": plain, "quarantine": emptied or ()})
        return EXIT_OK
    if verdicts is not None:
        output.print_verdicts(verdicts, dry_run=args.dry_run)
    if emptied is not None:
        output.print_quarantine(emptied, dry_run=args.dry_run)
    return EXIT_OK


def _parse_retention(args: argparse.Namespace) -> Retention | None:
    """Return the retention that the options describe; None if only the quarantine is to be emptied."""
    parts: list[Retention] = [] if args.spec is None else [CheckpointSpec.load(args.spec).keep]
    parts += [] if args.latest is None else [Latest(args.latest)]
    parts += [] if args.every_steps is None else [EveryNSteps(args.every_steps)]
    for text in args.best:
        metric, _, rest = text.partition(":")
        mode, _, count = rest.partition(":")
        if count and not count.isdecimal():
            raise SpecError(
                what=f"--best {text}: {count!r} is not a number of steps.",
                why="the last part is how many of the best steps to keep; without it, one.",
                fix=f"--best {metric}:{mode}:2",
            )
        parts.append(Best(metric, mode=mode, n=int(count or 1)))
    if not parts and args.quarantine:
        return None
    if not parts:
        raise SpecError(
            what="no option names the steps to keep.",
            why="a run's retention is in its spec, which its steps do not contain.",
            fix="--spec train.toml, or --latest 3 --best val_loss:min:2 --every-steps 10000; the parts add up. "
            "--quarantine alone deletes no step.",
        )
    return Union(*parts)


def run_pin(args: argparse.Namespace) -> int:
    """Protect steps from retention, or with `unpin` no longer."""
    root, steps = locate_steps(args.run, args.steps)
    pinned = args.command == "pin"
    RunDirectory(root.absolute()).pin(*steps, pinned=pinned)
    output.print_report(
        args, {"steps": list(steps), "pinned": pinned}, f"{args.command}ned {', '.join(map(str, steps))}"
    )
    return EXIT_OK


def run_record(args: argparse.Namespace) -> int:
    """Record metrics of a committed step."""
    words = list(itertools.takewhile(lambda word: "=" not in word, args.metrics))
    given = {name: _parse_number(name, value) for name, value in parse_pairs(args.metrics[len(words) :]).items()}
    root, (step, *others) = locate_steps(args.run, words)
    if others or not given:
        raise SpecError(
            what=f"{len(others) + 1} step(s) and {len(given)} metric(s) were given.",
            why="metrics are recorded for one step.",
            fix=f"ckpttools record {root} {step} val_loss=0.5",
        )
    metrics = record(root, step, given, overwrite=args.overwrite)
    shown = ", ".join(f"{name}={value:.6g}" for name, value in metrics.items())
    output.print_report(args, {"step": step, "metrics": metrics}, f"step {step}: {shown}")
    return EXIT_OK


def _parse_number(name: str, value: str) -> float:
    try:
        return float(value)
    except ValueError as error:
        raise SpecError(
            what=f"{name}={value}: {value!r} is not a number.",
            why="metrics are compared, so each must be a number.",
            fix=f"{name}=0.5",
        ) from error


def run_repair(args: argparse.Namespace) -> int:
    """Restore damaged manifests and metadata from their second copies."""
    report = repair(require_whole_run(args.run), dry_run=args.dry_run)
    repairs = [{**dataclasses.asdict(each), "possible": bool(each.done)} for each in report.repairs]
    output.print_report(args, {"dry_run": report.dry_run, "repairs": repairs}, str(report))
    return EXIT_OK if all(each.done for each in report.repairs) else EXIT_NO
