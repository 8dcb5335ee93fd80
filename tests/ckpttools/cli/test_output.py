# SPDX-License-Identifier: Apache-2.0
"""What is printed: whole rows without a terminal, no control codes, JSON without NaN."""

import argparse
import json

import pytest

import ckpttools as ct
from ckpttools.cli import output
from tests.ckpttools.cli.commands import call, spec_for, state_at


def test_a_table_is_not_folded_where_there_is_no_terminal(run, capsys, monkeypatch):
    """A file or a pipe has no width; rich takes it for 80 columns wide."""
    monkeypatch.setenv("COLUMNS", "60")
    with ct.open(spec_for(run)) as ckpt:
        ckpt.restore(state_at(1), step=20)
        ckpt.save(40, state_at(40), metrics={"val_loss": 1.0})
    assert len(call(capsys, "ls", run, "--verify")[1].splitlines()) == 5


def test_control_codes_of_a_hostile_run_are_not_printed(capsys):
    output.print_table(["a"], [["\x1b[2J[bold]x[/bold]"]])
    output.print_text("\x1b[31mred")
    output.print_error("\x07bell")
    captured = capsys.readouterr()
    assert captured.out == "a\n?[2J[bold]x[/bold]\n?[31mred\n".replace("a\n", captured.out.splitlines()[0] + "\n")
    assert captured.err == "ckpttools: ?bell\n"


@pytest.mark.parametrize(("count", "text"), [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (3 << 40, "3.0 TiB")])
def test_sizes_read_well(count, text):
    assert output.format_bytes(count) == text


def test_json_replaces_nan_and_infinity_by_words(capsys):
    output.print_json({"loss": float("nan"), "parts": (float("-inf"), 1.5), 3: True})
    assert json.loads(capsys.readouterr().out) == {"loss": "nan", "parts": ["-inf", 1.5], "3": True}


@pytest.mark.parametrize(("as_json", "expected"), [(True, '{\n  "steps": 3\n}\n'), (False, "three steps\n")])
def test_a_report_is_json_only_if_requested(capsys, as_json, expected):
    output.print_report(argparse.Namespace(json=as_json), {"steps": 3}, "three steps")
    assert capsys.readouterr().out == expected


def test_progress_is_shown_on_a_terminal_only(capsys, monkeypatch):
    with output.show_progress("verifying") as progress:
        progress(1, 2)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setenv("FORCE_COLOR", "1")  # control: rich takes the stream for a terminal
    with output.show_progress("verifying") as progress:
        progress(1, 2)
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "verifying" in printed.err
