# SPDX-License-Identifier: Apache-2.0
"""The commands that read or write arrays or copies of steps: `diff`, `adopt`, `export`, `import`, `mirror`."""

import argparse
import dataclasses

from remattools.text import format_bytes

from ..errors import SpecError
from ..mirror.fetch import fetch_step
from ..mirror.sync import MirrorReport, sync_mirror
from ..spec.mirror import Mirror, as_mirror
from ..spec.spec import CheckpointSpec
from ..tools.adopt import adopt
from ..tools.diff import diff
from ..tools.export_safetensors import export_safetensors
from ..tools.import_run import import_run
from . import output
from .arguments import parse_pair_of_steps, parse_pairs, require_whole_run
from .parser import EXIT_NO, EXIT_OK


def run_diff(args: argparse.Namespace) -> int:
    """Compare two steps."""
    first, second = parse_pair_of_steps(args.run, args.other)
    with output.show_progress("comparing") as progress:
        report = diff(first.location, second.location, steps=(first.step, second.step), progress=progress)
    output.print_report(args, report.as_dict(), str(report))
    return EXIT_OK if report.same else EXIT_NO


def run_adopt(args: argparse.Namespace) -> int:
    """Adopt checkpoints of Orbax or flax."""
    run = args.run if args.into is not None else require_whole_run(args.run)
    steps = adopt(run, into=args.into, step=args.step, dry_run=args.dry_run)
    done = "would adopt" if args.dry_run else "adopted"
    output.print_report(
        args, {"dry_run": args.dry_run, "steps": steps}, f"{done} {', '.join(map(str, steps)) or 'nothing'}"
    )
    return EXIT_OK


def run_export(args: argparse.Namespace) -> int:
    """Write a step's weights to a safetensors file."""
    renamed, metadata = parse_pairs(args.name) or None, parse_pairs(args.meta) or None
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
    output.print_report(args, {"file": str(args.file), "tensors": names}, f"{len(names)} tensors in {args.file}")
    return EXIT_OK


def run_import(args: argparse.Namespace) -> int:
    """Create a run from a safetensors file."""
    names = parse_pairs(args.name)
    with output.show_progress("importing") as progress:
        count = import_run(
            args.file, args.run, step=args.step, item=args.item, names=names, skip=args.skip, progress=progress
        )
    output.print_report(args, {"step": args.step, "leaves": count}, f"{count} leaves in step {args.step} of {args.run}")
    return EXIT_OK


def run_mirror(args: argparse.Namespace) -> int:
    """Bring a mirror up to date, compare it, or fetch a step from it."""
    mirror = _parse_mirror(args)
    if args.fetch is not None:
        if args.fetch != "latest" and not args.fetch.isdecimal():
            raise SpecError(
                what=f"--fetch {args.fetch}: not a step.",
                why="a step is a number; without one, the newest is fetched.",
                fix="--fetch 500, after the run and the address",
            )
        step = None if args.fetch == "latest" else int(args.fetch)
        with output.show_progress("fetching") as progress:
            fetched = fetch_step(args.run, mirror, step, progress=progress)
        output.print_report(args, {"fetched": fetched}, f"fetched step {fetched}")
        return EXIT_OK
    with output.show_progress("comparing" if args.dry_run else "copying") as progress:
        report = sync_mirror(
            require_whole_run(args.run), mirror, check=args.check, dry_run=args.dry_run, progress=progress
        )
    if args.json:
        output.print_json(report.as_dict())
    else:
        _print_mirror(report)
    return EXIT_OK if report.ok else EXIT_NO


def _parse_mirror(args: argparse.Namespace) -> Mirror:
    named = None if args.spec is None else as_mirror(CheckpointSpec.load(args.spec).mirror)
    options = {name: _parse_value(value) for name, value in parse_pairs(args.option).items()}
    if args.url is not None:
        return Mirror(args.url, options=options)
    if named is None:
        raise SpecError(
            what="neither the arguments nor a spec name a mirror.",
            why="its address is in the run's spec, which the steps do not contain.",
            fix="ckpttools mirror runs/exp1 s3://bucket/run, or --spec train.toml.",
        )
    return dataclasses.replace(named, options={**named.store_options, **options})


def _parse_value(text: str) -> str | int | bool:
    """Parse an option's value as TOML would, without the quotes."""
    return {"true": True, "false": False}.get(text, int(text) if text.isdecimal() else text)


def _print_mirror(report: MirrorReport) -> None:
    """The table of `mirror`."""
    output.print_text(str(report).partition("\n")[0])
    rows = [
        [
            str(step.step),
            format_bytes(step.total_bytes),
            "yes" if step.here else "",
            step.there,
            "; ".join([*([step.done] if step.done else []), *step.files]),
        ]
        for step in report.steps
    ]
    if rows:
        output.print_table(["step", "size", "here", "there", ""], rows, numeric=["step", "size"])
    if report.left or not rows:
        output.print_text(report.left or "no steps")
