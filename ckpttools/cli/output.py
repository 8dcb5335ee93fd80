# SPDX-License-Identifier: Apache-2.0
"""What the command line prints: tables for people, JSON for programs, progress on a terminal.

Names and reasons come from files that anybody may have written, so none of them reaches a terminal as a control
code, or rich as markup.
"""

import argparse
import contextlib
import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn, TransferSpeedColumn

from remattools.text import format_bytes, make_table, replace_control_codes

from ..spec.retention import Verdict
from ..tools.ls import ListedStep, find_numeric_columns, make_rows
from ..tools.show import ShownStep, format_excluded, format_leaf, format_lineage

_FILE_WIDTH = 10_000
"""Columns where the output goes to a file or pipe: a step stays on one line, for `grep`."""


class _Console(Console):
    """Raise when the reader of the output has left, where rich would end the process with 1."""

    def on_broken_pipe(self) -> None:
        """Called when the reader of the output has left."""
        raise BrokenPipeError


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, numeric: Sequence[str] = ()) -> None:
    """Print a table; the columns named in `numeric` are aligned right."""
    console = _Console(markup=False, highlight=False, emoji=False)
    if not console.is_terminal:
        console.width = _FILE_WIDTH  # as an argument of `print` it could only be narrower than the console
    console.print(make_table(columns, rows, numeric=numeric))


def print_text(text: str) -> None:
    """Print text whose parts may come from a file."""
    print("\n".join(map(replace_control_codes, text.splitlines())))


def print_json(data: Any) -> None:
    """Print plain data; NaN and infinities, which JSON lacks, as words."""
    print(json.dumps(_replace_non_finite(data), indent=2, default=str))


def _replace_non_finite(data: Any) -> Any:
    if isinstance(data, float) and not math.isfinite(data):
        return str(data)
    if isinstance(data, dict):
        return {str(key): _replace_non_finite(value) for key, value in data.items()}
    return [_replace_non_finite(value) for value in data] if isinstance(data, list | tuple) else data


@contextlib.contextmanager
def show_progress(text: str) -> Iterator[Callable[[int, int], None]]:
    """Show a bar of bytes on the error stream if that is a terminal."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn())
    with Progress(
        *columns, TimeElapsedColumn(), console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task(text, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def print_steps(steps: Sequence[ListedStep]) -> None:
    """The table of `ls`."""
    if not steps:
        print("no steps")
        return
    columns, rows = make_rows(steps)
    print_table(columns, rows, numeric=find_numeric_columns(columns))


def print_tree(step: ShownStep) -> None:
    """The table of `show`, with the sum of each item."""
    metrics = ", ".join(f"{name}={value:.6g}" for name, value in step.metrics.items())
    print_text(f"step {step.step}: {step.state}; {step.reason or 'no reason given'}{'; ' + metrics if metrics else ''}")
    if step.lineage:
        print_text(f"lineage: {format_lineage(step.lineage)}")
    rows = [[leaf.name, format_leaf(leaf), format_bytes(leaf.bytes) if leaf.bytes else ""] for leaf in step.leaves]
    print_table(["leaf", "form", "bytes"], rows, numeric=["bytes"])
    for line in format_excluded(step.excluded):
        print_text(line)
    sums: dict[str, int] = {}
    for leaf in step.leaves:
        item = leaf.name.partition(".")[0]
        sums[item] = sums.get(item, 0) + leaf.bytes
    each = ", ".join(f"{item} {format_bytes(count)}" for item, count in sums.items())
    print_text(f"{each or 'no items'}; on the disk {format_bytes(step.total_bytes)}")


def print_verdicts(verdicts: Sequence[Verdict], *, dry_run: bool) -> None:
    """The table of `prune`."""
    deletion = "would be deleted" if dry_run else "deleted"
    rows = [
        [str(verdict.step.step), "kept" if verdict.keep else deletion, verdict.reason]
        for verdict in sorted(verdicts, key=lambda verdict: verdict.step.step)
    ]
    print_table(["step", "", "why"], rows, numeric=["step"]) if rows else print("no steps")


def print_quarantine(names: Sequence[str], *, dry_run: bool) -> None:
    """What `prune` deletes from quarantine."""
    deletion = "would be deleted" if dry_run else "deleted"
    print_text("\n".join(f"quarantined {name} {deletion}" for name in names) or "nothing to delete in quarantine")


def print_error(text: str) -> None:
    """Say on the error stream why nothing was done."""
    lines = "\n".join(map(replace_control_codes, text.splitlines()))
    print(f"ckpttools: {lines}", file=sys.stderr)


def print_report(args: argparse.Namespace, data: Any, text: str) -> None:
    """Print a report as JSON if `--json` was given, else as text.

    Args:
        args: The parsed arguments.
        data: The report as plain data.
        text: The report for people.
    """
    if args.json:
        print_json(data)
    else:
        print_text(text)
