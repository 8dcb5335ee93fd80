# SPDX-License-Identifier: Apache-2.0
"""Reports as text: tables that look the same on a terminal, in a notebook and in a file.

Names come from files that anybody may have written, so nothing of them reaches a terminal as a control code, or rich
as markup.
"""

import io
from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table

_TABLE_WIDTH = 160


def format_table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, numeric: Sequence[str] = ()) -> str:
    """Rows under a head; the columns named in `numeric` are numbers."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(
            replace_control_codes(column), justify="right" if column in numeric else "left", overflow="fold"
        )
    for row in rows:
        table.add_row(*map(replace_control_codes, row))
    stream = io.StringIO()
    Console(file=stream, width=_TABLE_WIDTH, markup=False, highlight=False, emoji=False, color_system=None).print(table)
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines())


def replace_control_codes(text: str) -> str:
    """A text without control codes."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def format_bytes(count: int) -> str:
    """A size in the unit that leaves it below 1024."""
    size, units = float(count), ["B", "KiB", "MiB", "GiB", "TiB"]
    while size >= 1024 and len(units) > 1:
        size, units = size / 1024, units[1:]
    return f"{size:.0f} {units[0]}" if units[0] == "B" else f"{size:.1f} {units[0]}"


def format_health(
    step: int, verdict: str, reason: str, *, leaves: Sequence[str], files: Sequence[str], origin: str = ""
) -> str:
    """One step and what is wrong with it: a line of its own for each damaged leaf and file."""
    # The reason is often an error's text, which names the step and the verdict for those who see nothing else.
    reason = reason.removeprefix(f"step {step} is {verdict}: ")
    lines = [f"step {step}{origin}: {verdict}" + (f", {reason}" if reason else "")]
    lines += [f"    damaged leaf: {leaf}" for leaf in leaves]
    lines += [f"    damaged file: {file}" for file in files]
    return "\n".join(lines)
