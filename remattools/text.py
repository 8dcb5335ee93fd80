# SPDX-License-Identifier: Apache-2.0
"""Reports as text: tables and byte counts that look the same on a terminal, in a notebook and in a file.

Imports rich only: both packages print through this file, and `ckpttools ls` runs without JAX. Names may come from
files that anybody can write, so no cell reaches a terminal as a control code, or rich as markup.
"""

import io
from collections.abc import Iterable, Sequence
from typing import Literal

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

_TEXT_WIDTH = 160
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def make_table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, numeric: Sequence[str] = ()) -> Table:
    """Return a table without lines, for `render_text` or for a rich console.

    Args:
        columns: Titles.
        rows: Cells, one for each column; control codes are replaced.
        numeric: Titles of the columns to align right.
    """
    table = Table(box=None, pad_edge=False, header_style="bold", title_justify="left", caption_justify="left")
    for column in columns:
        justify: Literal["right", "left"] = "right" if column in numeric else "left"
        table.add_column(Text(replace_control_codes(column)), justify=justify, overflow="fold")
    for row in rows:
        table.add_row(*(Text(replace_control_codes(cell)) for cell in row))
    return table


def render_text(*parts: RenderableType) -> str:
    """Return rich renderables as plain text, without trailing blanks."""
    stream = io.StringIO()
    console = Console(file=stream, width=_TEXT_WIDTH, markup=False, highlight=False, emoji=False, color_system=None)
    for part in parts:
        console.print(part)
    return "\n".join(line.rstrip() for line in stream.getvalue().rstrip().splitlines())


def format_table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, numeric: Sequence[str] = ()) -> str:
    """Return rows below their titles as plain text.

    Args:
        columns: Titles.
        rows: Cells, one for each column; control codes are replaced.
        numeric: Titles of the columns to align right.

    Example:
        >>> print(format_table(["leaf", "bytes"], [["kernel", "512 B"], ["bias", "64 B"]], numeric=["bytes"]))
        leaf    bytes
        kernel  512 B
        bias     64 B
    """
    return render_text(make_table(columns, rows, numeric=numeric))


def replace_control_codes(text: str) -> str:
    """Return `text` with "?" for every character that is not printable."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def format_bytes(count: int | None) -> str:
    """Return a size in the largest binary unit of which there is at least one; "-" for None.

    Example:
        >>> format_bytes(1536), format_bytes(512), format_bytes(None)
        ('1.5 KiB', '512 B', '-')
    """
    if count is None:
        return "-"
    size, unit = float(count), 0
    while abs(size) >= 1024 and unit < len(_UNITS) - 1:
        size, unit = size / 1024, unit + 1
    return f"{size:.1f} {_UNITS[unit]}" if unit else f"{count:.0f} B"
