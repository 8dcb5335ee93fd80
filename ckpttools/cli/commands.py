# SPDX-License-Identifier: Apache-2.0
"""`ckpttools ls|show|verify|diff|prune|pin|unpin|repair|adopt|export|import|mirror`.

Entry point. Parses, calls one library function, prints, returns an exit code; so a notebook can do whatever a shell
can. What only reads takes no lock and may look at a run that is being written.
"""

import argparse
import dataclasses
import os
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..errors import CheckpointError, SpecError, StepDamagedError, UntrustedStepError
from ..mirror.sync import fetch_step, sync_mirror
from ..spec.mirror import Mirror, as_mirror
from ..spec.retention import Best, EveryNSteps, Latest, Retention, Union
from ..spec.spec import CheckpointSpec
from ..store import layout
from ..store.run_directory import RunDirectory, require_run_directory
from ..tools.adopt import adopt
from ..tools.diff import diff
from ..tools.import_run import import_run
from ..tools.ls import empty_quarantine, ls, prune
from ..tools.repair import repair
from ..tools.safetensors_exchange import export_safetensors
from ..tools.show import show
from ..tools.verify import verify
from . import output
from .parser import build_parser

# argparse also exits with 2 on bad usage.
OK, NO, CANNOT, INTERRUPTED = 0, 1, 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; `argv` excludes the program's name, so that tests call it directly."""
    args = build_parser().parse_args(argv)
    try:
        code = COMMANDS[args.command](args)
        sys.stdout.flush()
        return code
    except StepDamagedError as error:
        damaged = [f"\n    damaged leaf: {name}" for name in error.leaves]
        damaged += [f"\n    damaged file: {name}" for name in error.files]
        # Somebody at a shell is helped by a command for this run, unless the error knows better.
        usual = error.fix == error.default_fix and not isinstance(error, UntrustedStepError)
        commands = f"ckpttools verify {args.run} names all damage; ckpttools repair puts back what it can."
        fix = commands if usual else error.fix
        output.print_error(f"{args.run}: {error.what}{''.join(damaged)}\n  why: {error.why}\n  fix: {fix}")
        return CANNOT
    except CheckpointError as error:
        output.print_error(str(error))
        return CANNOT
    except OSError as error:
        if isinstance(error, BrokenPipeError):
            # `ckpttools show run | head`: the reader has seen enough. What is still buffered must not raise at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return OK
        output.print_error(f"{error.filename or args.run} cannot be read or written: {error.strerror or error}.")
        return CANNOT
    except KeyboardInterrupt:
        return INTERRUPTED


def parse_run_path(path: pathlib.Path) -> tuple[pathlib.Path, int | None]:
    """A run's folder and a step's number from either of their paths.

    Raises:
        CheckpointError: If there is no such folder.
    """
    path = path.absolute()
    step = layout.parse_step_number(path.name)
    looks_like_step = (path / layout.MANIFEST).exists() or (path / "_CHECKPOINT_METADATA").exists()
    if step is not None and (looks_like_step or not path.is_dir()) and path.parent.is_dir():
        return path.parent, step
    return require_run_directory(path), None


def _require_whole_run(path: pathlib.Path) -> pathlib.Path:
    """The folder of a run, for what is done to runs only.

    Raises:
        CheckpointError: If it is no folder, or that of one step.
    """
    if path.is_dir() and parse_run_path(path)[1] is not None:
        raise CheckpointError(
            what=f"{path} is one step of a run.",
            why="this command is for whole runs; in the folder of a step it would find no steps.",
            fix=f"ckpttools ... {os.path.normpath(path / '..')}",
        )
    return require_run_directory(path)


def _ls(args: argparse.Namespace) -> int:
    rows = list(ls(_require_whole_run(args.run)))
    if args.verify:
        with output.show_progress("verifying") as progress:
            report = verify(args.run, progress=progress)
        health = {step.step: step for step in report.steps}
        rows = [
            dataclasses.replace(row, state=f"{row.state}, {health[row.step].state}")
            if row.state in ("committed", "superseded") and row.step in health
            else row
            for row in rows
        ]
    if args.json:
        output.print_json([dataclasses.asdict(row) for row in rows])
    else:
        output.print_steps(rows)
    return OK if not args.verify or report.ok else NO


def _show(args: argparse.Namespace) -> int:
    shown = show(*parse_run_path(args.run))
    if args.json:
        output.print_json(shown.as_dict())
    else:
        output.print_tree(shown)
    return OK


def _verify(args: argparse.Namespace) -> int:
    with output.show_progress("verifying") as progress:
        report = verify(*parse_run_path(args.run), progress=progress)
    _print(args, report.as_dict(), str(report))
    return OK if report.ok else NO


def _diff(args: argparse.Namespace) -> int:
    run, step = parse_run_path(args.run)
    bare_number = str(args.other).isdecimal() and not args.other.is_dir()
    other, number = (run, int(str(args.other))) if bare_number else parse_run_path(args.other)
    with output.show_progress("comparing") as progress:
        report = diff(run, other, steps=(step, number), progress=progress)
    _print(args, report.as_dict(), str(report))
    return OK if report.same else NO


def _prune(args: argparse.Namespace) -> int:
    run, keep = _require_whole_run(args.run), _parse_retention(args)
    verdicts = None if keep is None else prune(run, keep, dry_run=args.dry_run)
    emptied = empty_quarantine(run, dry_run=args.dry_run) if args.quarantine else None
    if args.json:
        plain = [{"step": each.step.step, "keep": each.keep, "reason": each.reason} for each in verdicts or ()]
        output.print_json({"dry_run": args.dry_run, "steps": plain, "quarantine": emptied or ()})
        return OK
    if verdicts is not None:
        output.print_verdicts(verdicts, dry_run=args.dry_run)
    if emptied is not None:
        output.print_quarantine(emptied, dry_run=args.dry_run)
    return OK


def _parse_retention(args: argparse.Namespace) -> Retention | None:
    """What the options say is to be kept; None if only the quarantine is meant."""
    parts: list[Retention] = [] if args.spec is None else [CheckpointSpec.load(args.spec).keep]
    parts += [] if args.latest is None else [Latest(args.latest)]
    parts += [] if args.every_steps is None else [EveryNSteps(args.every_steps)]
    for text in args.best:
        metric, _, rest = text.partition(":")
        mode, _, count = rest.partition(":")
        if count and not count.isdecimal():
            raise SpecError(
                what=f"--best {text}: {count!r} is no number of steps.",
                why="it says how many of the best are kept; without it, one is.",
                fix=f"--best {metric}:{mode}:2",
            )
        parts.append(Best(metric, mode=mode, n=int(count or 1)))
    if not parts and args.quarantine:
        return None
    if not parts:
        raise SpecError(
            what="nothing says which steps to keep.",
            why="the retention of a run stands in its spec, and the steps do not hold it.",
            fix="--spec train.toml, or --latest 3 --best val_loss:min:2 --every-steps 10000; the parts add up. "
            "--quarantine alone deletes no step.",
        )
    return Union(*parts)


def _pin(args: argparse.Namespace) -> int:
    run, pinned = RunDirectory(_require_whole_run(args.run).absolute()), args.command == "pin"
    for step in args.steps:
        run.pin(step, pinned=pinned)
    _print(args, {"steps": args.steps, "pinned": pinned}, f"{args.command}ned {', '.join(map(str, args.steps))}")
    return OK


def _repair(args: argparse.Namespace) -> int:
    report = repair(_require_whole_run(args.run), dry_run=args.dry_run)
    repairs = [{**dataclasses.asdict(each), "possible": bool(each.done)} for each in report.repairs]
    _print(args, {"dry_run": report.dry_run, "repairs": repairs}, str(report))
    return OK if all(each.done for each in report.repairs) else NO


def _export(args: argparse.Namespace) -> int:
    renamed, metadata = dict(map(_parse_pair, args.name)) or None, dict(map(_parse_pair, args.meta)) or None
    with output.show_progress("exporting") as progress:
        names = export_safetensors(
            args.run,
            args.file,
            item=args.item,
            names=renamed,
            skip=args.skip,
            metadata=metadata,
            progress=progress,
        )
    _print(args, {"file": str(args.file), "tensors": names}, f"{len(names)} tensors in {args.file}")
    return OK


def _import(args: argparse.Namespace) -> int:
    names = dict(map(_parse_pair, args.name))
    with output.show_progress("importing") as progress:
        count = import_run(
            args.file, args.run, step=args.step, item=args.item, names=names, skip=args.skip, progress=progress
        )
    _print(args, {"step": args.step, "leaves": count}, f"{count} leaves in step {args.step} of {args.run}")
    return OK


def _mirror(args: argparse.Namespace) -> int:
    mirror = _parse_mirror(args)
    if args.fetch is not None:
        if args.fetch != "latest" and not args.fetch.isdecimal():
            raise SpecError(
                what=f"--fetch {args.fetch}: that is no step.",
                why="a step is a number; without one the newest is fetched.",
                fix="--fetch 500, after the run and the address",
            )
        step = None if args.fetch == "latest" else int(args.fetch)
        with output.show_progress("fetching") as progress:
            fetched = fetch_step(args.run, mirror, step, progress=progress)
        _print(args, {"fetched": fetched}, f"fetched step {fetched}")
        return OK
    with output.show_progress("comparing" if args.dry_run else "copying") as progress:
        report = sync_mirror(
            _require_whole_run(args.run), mirror, check=args.check, dry_run=args.dry_run, progress=progress
        )
    if args.json:
        output.print_json(report.as_dict())
    else:
        output.print_mirror(report)
    return OK if report.ok else NO


def _parse_mirror(args: argparse.Namespace) -> Mirror:
    named = None if args.spec is None else as_mirror(CheckpointSpec.load(args.spec).mirror)
    options = {name: _parse_value(value) for name, value in map(_parse_pair, args.option)}
    if args.url is not None:
        return Mirror(args.url, options=options)
    if named is None:
        raise SpecError(
            what="nothing says where the mirror is.",
            why="its address stands in the spec of the run, and the steps do not hold it.",
            fix="ckpttools mirror runs/exp1 s3://bucket/run, or --spec train.toml.",
        )
    return dataclasses.replace(named, options={**named.store_options, **options})


def _parse_value(text: str) -> str | int | bool:
    """An option's value as TOML would read it, without the quotes."""
    return {"true": True, "false": False}.get(text, int(text) if text.isdecimal() else text)


def _parse_pair(text: str) -> tuple[str, str]:
    name, separator, value = text.partition("=")
    if not separator:
        raise SpecError(what=f"{text!r} has no '='.", why="it gives something a name or a value.", fix=f"{text}=...")
    return name, value


def _adopt(args: argparse.Namespace) -> int:
    steps = adopt(_require_whole_run(args.run), dry_run=args.dry_run)
    done = "would take over" if args.dry_run else "took over"
    _print(args, {"dry_run": args.dry_run, "steps": steps}, f"{done} {', '.join(map(str, steps)) or 'nothing'}")
    return OK


def _print(args: argparse.Namespace, data: Any, text: str) -> None:
    if args.json:
        output.print_json(data)
    else:
        output.print_text(text)


COMMANDS: Mapping[str, Callable[[argparse.Namespace], int]] = {
    "ls": _ls,
    "show": _show,
    "verify": _verify,
    "diff": _diff,
    "prune": _prune,
    "pin": _pin,
    "unpin": _pin,
    "repair": _repair,
    "export": _export,
    "import": _import,
    "mirror": _mirror,
    "adopt": _adopt,
}
