# SPDX-License-Identifier: Apache-2.0
"""Paths of runs and of steps are told apart, and a pair is split at its first sign."""

import json
import pathlib
import re
import shutil

import pytest

import ckpttools as ct
from ckpttools.cli import arguments, parser
from tests.ckpttools.cli.commands import call, spec_for, state_at


def addresses(*words):
    return [(each.location, each.step) for each in arguments.parse_addresses(*words[:1], map(str, words[1:]))]


def test_a_number_is_a_step_of_the_run_before_it(run):
    assert addresses(run) == [(run, None)]
    assert addresses(run, 20) == [(run, 20)]
    assert addresses(run, 20, 23) == [(run, 20), (run, 23)]
    assert addresses(run / "10", 20) == [(run / "10", None), (run, 20)]
    assert addresses(run, 20, run / "10", 30) == [(run, 20), (run / "10", None), (run, 30)]
    assert addresses(run, run / "20") == [(run, None), (run / "20", None)], "control: a path"
    assert addresses("s3://bucket/run", 20) == [("s3://bucket/run", 20)]


def test_a_directory_named_by_a_number_is_a_location(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "2024").mkdir()
    assert addresses(run, 2024) == [(run, None), (pathlib.Path("2024"), None)]
    monkeypatch.chdir(run)
    assert addresses(pathlib.Path(), 20) == [(pathlib.Path(), 20)], "inside the run it is the step"


@pytest.mark.parametrize("words", [["RUN", "8"], ["RUN/8"], ["RUN/8", "--json"], ["RUN", "--json", "8"]], ids=" ".join)
def test_all_commands_understand_both_ways_to_name_a_step(tmp_path, capsys, words):
    with ct.open(spec_for(tmp_path / "run")) as ckpt:
        for step in (8, 9):
            ckpt.save(step, state_at(step))
    words = [word.replace("RUN", str(tmp_path / "run")) for word in words]
    assert call(capsys, "record", *words, "val_loss=0.5")[0] == parser.EXIT_OK
    assert call(capsys, "pin", *words)[0] == parser.EXIT_OK
    assert call(capsys, "verify", *words)[0] == parser.EXIT_OK
    shown = ct.ls(tmp_path / "run")
    assert [(row.metrics, row.pinned) for row in shown] == [({"val_loss": 0.5}, True), ({}, False)]
    code, out, _ = call(capsys, "show", *words, *([] if "--json" in words else ["--json"]))
    assert (code, json.loads(out)["step"]) == (parser.EXIT_OK, 8), "control: the newest is 9"


def test_two_steps_of_one_run_are_compared_by_number(run, capsys):
    both = call(capsys, "diff", run / "10", run / "20")
    assert call(capsys, "diff", run, "10", "20") == both
    assert call(capsys, "diff", run, "20") == call(capsys, "diff", run / "30", run / "20") != both, (
        "control: the newest"
    )


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["record", "RUN", "loss=1"], "no step of .* was named"),
        (["record", "RUN", "20", "30", "loss=1"], "2 step.* were given"),
        (["record", "RUN", "20"], "0 metric.* were given"),
        (["record", "RUN/77", "loss=1"], "step 77 of .* is not committed"),
        (["pin", "RUN"], "no step of .* was named"),
        (["pin", "RUN", "newest"], "newest does not exist"),
        (["pin", "RUN/20", "OTHER/20"], "several runs"),
        (["show", "RUN", "20", "30"], "takes one step"),
        (["diff", "RUN", "10", "20", "30"], "3 steps were given"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_too_few_and_too_many_steps_are_refused(run, tmp_path, capsys, argv, text):
    other = shutil.copytree(run, tmp_path / "other")
    argv = [word.replace("RUN", str(run)).replace("OTHER", str(other)) for word in argv]
    code, out, err = call(capsys, *argv)
    assert (code, out) == (parser.EXIT_FAILED, "")
    assert re.search(text, err)
    assert not any(row.pinned or "loss" in row.metrics for row in ct.ls(run))


def test_a_misspelt_run_is_refused(tmp_path):
    with pytest.raises(ct.StorageError, match="does not exist"):
        arguments.require_whole_run(tmp_path / "misspelt")


def test_a_pair_is_split_at_its_first_equals_sign():
    assert arguments.parse_pair("layers.*=h.*=x") == ("layers.*", "h.*=x")
    assert arguments.parse_pair("note=") == ("note", "")
    with pytest.raises(ct.SpecError, match="'large' has no '='") as caught:
        arguments.parse_pair("large")
    assert caught.value.fix == "large=..."


@pytest.mark.parametrize(
    "argv",
    [
        ["prune", "--latest", "1"],
        ["prune", "--quarantine"],
        ["repair"],
        ["adopt"],
        ["mirror", "m"],
    ],
    ids=lambda a: a[0],
)
def test_a_step_given_instead_of_a_run_is_refused(run, capsys, argv):
    code, out, err = call(capsys, argv[0], run / "20", *argv[1:])
    assert (code, out) == (parser.EXIT_FAILED, "")
    assert "is one step of a run" in err
    assert f"ckpttools ... {run}" in err
