# SPDX-License-Identifier: Apache-2.0
"""Try the surgery that an error suggests on changes that people make to a state, and measure how long it takes.

    python benchmarks/ckpt_surgery.py [--write] [--save FILE] [--before FILE]

Each change is saved to a run and loaded with what the error suggests; every leaf is compared with the value that it
must have. `--save` writes the outcomes to a file, and `--before` reads such a file of an older version for comparison.
`--write` writes docs/benchmarks/ckpt_surgery.md.
"""

import argparse
import dataclasses
import datetime
import importlib.metadata
import json
import os
import pathlib
import sys
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

from tests.ckpttools.surgery.change_list import list_changes
from tests.ckpttools.surgery.changes import load_from_disk, try_change
from tests.ckpttools.surgery.large_states import list_large_states, time_suggestion

TARGET = pathlib.Path(__file__).parents[1] / "docs" / "benchmarks" / "ckpt_surgery.md"


def try_all() -> dict[str, dict]:
    """Return the outcome of each change by its name."""
    found = {}
    for change in list_changes():
        try:
            found[change.name] = dataclasses.asdict(try_change(change, load_from_disk))
        except Exception as error:  # An older version may suggest what it cannot load.
            found[change.name] = {
                "suggested": [],
                "right": False,
                "kept": 0.0,
                "possible": 0.0,
                "wrong": f"{type(error).__name__}",
            }
    return found


def measure_times() -> list[str]:
    """Return the seconds that a suggestion takes as a Markdown table."""
    lines = ["| leaves | change | seconds | operations |", "| ---: | --- | ---: | ---: |"]
    for name, old, new in list_large_states():
        for count in (1_000, 3_000, 10_000):
            seconds, leaves, operations = time_suggestion(old(count), new(count))
            lines.append(f"| {leaves:,} | {name} | {seconds:.2f} | {operations} |")
    return lines


def format_outcome(outcome: dict) -> str:
    """Return a verdict and the share of the floats that is kept."""
    if not outcome["suggested"] and outcome["kept"] == 0:
        return "none" + (", right" if outcome["right"] else "")
    return f"{'right' if outcome['right'] else '**wrong**'}, {100 * outcome['kept']:.0f} %"


def format_report(now: dict[str, dict], before: dict[str, dict], times: list[str]) -> str:
    """Return the page."""
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "flax", "optax"))
    right = sum(outcome["right"] for outcome in now.values())
    head = [
        "# Suggested surgery",
        "",
        f"`python benchmarks/ckpt_surgery.py --write`, {datetime.date.today()}, CPU, {versions}.",
        "",
        f"{len(now)} changes to a state. Each old state was saved with a value of its own in every float; each new one "
        "was loaded with the surgery that the error suggested, and every leaf compared with the value that it must "
        "have. "
        f"Right: {right} of {len(now)}"
        + (f"; before: {sum(each['right'] for each in before.values())}." if before else ".")
        + " The percentage is the share of the stored floats (by bytes) that is in the state afterwards; *possible* is "
        "that of the right answer. *None*: nothing was suggested.",
        "",
    ]
    columns = ["change", *(["before"] if before else []), "now", "possible", "suggested"]
    lines = [f"| {' | '.join(columns)} |", f"| {' | '.join('---' for _ in columns)} |"]
    for name, outcome in now.items():
        old = [format_outcome(before[name]) if name in before else ""] if before else []
        code = "<br>".join(f"`{each.removeprefix('ct.')}`" for each in outcome["suggested"])
        cells = [name, *old, format_outcome(outcome), f"{100 * outcome['possible']:.0f} %", code]
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    tail = [
        "",
        "## Time",
        "",
        "Seconds of the processor to trace, write down and try a suggestion; the machine was busy with other work.",
        "",
        *times,
        "",
    ]
    return "\n".join([*head, *lines, *(tail if times else [""])])


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--write", action="store_true", help=f"write {TARGET.name}")
    parser.add_argument("--save", type=pathlib.Path, help="write the outcomes to this file")
    parser.add_argument("--before", type=pathlib.Path, help="outcomes of an older version")
    args = parser.parse_args()
    began = time.perf_counter()
    now = try_all()
    if args.save:
        args.save.write_text(json.dumps(now))
        return
    before = json.loads(args.before.read_text()) if args.before else {}
    report = format_report(now, before, measure_times())
    print(report)
    print(f"{time.perf_counter() - began:.0f} s", file=sys.stderr)
    if args.write:
        TARGET.write_text(report)


if __name__ == "__main__":
    main()
