# SPDX-License-Identifier: Apache-2.0
"""Tables and byte counts as plain text, whatever names hold."""

import pytest
from rich.text import Text

from remattools.text import format_bytes, format_table, make_table, render_text, replace_control_codes


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (None, "-"),
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (-1536, "-1.5 KiB"),
        (5 * 2**30, "5.0 GiB"),
        (3 * 2**50, "3072.0 TiB"),
    ],
)
def test_bytes_take_the_largest_unit_that_fits(count, text):
    assert format_bytes(count) == text


def test_numeric_columns_are_aligned_right():
    rows = [["kernel", "512 B"], ["bias", "64 B"]]
    assert format_table(["leaf", "size"], rows, numeric=["size"]).splitlines()[2] == "bias     64 B"
    assert format_table(["leaf", "size"], rows).splitlines()[2] == "bias    64 B"


def test_names_reach_a_terminal_without_control_codes_or_markup():
    text = format_table(["[bold]leaf"], [["a\x1b[31mb\nc"], ["[red]d[/red]"]])
    assert text.splitlines() == ["[bold]leaf", "a?[31mb?c", "[red]d[/red]"]
    assert replace_control_codes("ü→\t\x7f") == "ü→??"


def test_parts_follow_each_other_without_trailing_blanks():
    assert render_text(make_table(["a", "b"], [["1", ""]]), Text("below  ")) == "a  b\n1\nbelow"


def test_a_long_cell_is_folded_and_loses_nothing():
    lines = format_table(["name", "size"], [["x" * 200, "1 B"]]).splitlines()
    assert max(map(len, lines)) <= 160
    assert sum(line.count("x") for line in lines) == 200
