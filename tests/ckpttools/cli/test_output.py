# SPDX-License-Identifier: Apache-2.0
"""What is printed: whole rows without a terminal, no control codes, JSON without NaN."""

import argparse
import json

import pytest

import ckpttools as ct
from ckpttools.cli import output
from ckpttools.spec.retention import StepInfo, Verdict
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


def test_a_tree_ends_with_the_bytes_of_each_item(capsys):
    leaves = (
        ct.ShownLeaf(name="model.kernel", kind="array", shape=(256, 2), dtype="float32", bytes=2048),
        ct.ShownLeaf(name="model.bias", kind="array", shape=(256,), dtype="float32", bytes=1024),
        ct.ShownLeaf(name="data.epoch", kind="value", dtype="int", value=4),
    )
    shown = ct.ShownStep(step=5, state="committed", total_bytes=4096, metrics={"loss": 0.5}, leaves=leaves)
    output.print_tree(shown)
    head, *rows, sums = capsys.readouterr().out.splitlines()
    assert head == "step 5: committed; no reason given; loss=0.5"
    assert [row.split() for row in rows[-3:]] == [
        ["model.kernel", "float32[256,2]", "2.0", "KiB"],
        ["model.bias", "float32[256]", "1.0", "KiB"],
        ["data.epoch", "4"],
    ]
    assert sums == "model 3.0 KiB, data 0 B; on the disk 4.0 KiB"


@pytest.mark.parametrize(("dry_run", "word"), [(True, "would be deleted"), (False, "deleted")])
def test_verdicts_and_quarantine_say_whether_steps_are_deleted(capsys, dry_run, word):
    verdicts = [
        Verdict(StepInfo(step=20, sequence=2), keep=True, reason="latest"),
        Verdict(StepInfo(step=10, sequence=1), keep=False, reason="nothing keeps it"),
    ]
    output.print_verdicts(verdicts, dry_run=dry_run)
    output.print_quarantine(["30"], dry_run=dry_run)
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert [" ".join(line.split()) for line in lines[-3:]] == [
        f"10 {word} nothing keeps it",
        "20 kept latest",
        f"quarantined 30 {word}",
    ]


def test_nothing_to_delete_is_said(capsys):
    output.print_verdicts([], dry_run=True)
    output.print_quarantine([], dry_run=True)
    output.print_steps([])
    assert capsys.readouterr().out == "no steps\nnothing to delete in quarantine\nno steps\n"
