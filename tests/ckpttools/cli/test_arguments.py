# SPDX-License-Identifier: Apache-2.0
"""Paths of runs and of steps are told apart, and a pair is split at its first sign."""

import pytest

import ckpttools as ct
from ckpttools.cli import arguments, parser
from tests.ckpttools.cli.commands import call


def test_a_number_means_another_step_of_the_same_run(run):
    assert arguments.find_other_step(run, "20") == (run, 20)
    assert arguments.find_other_step(run / "10", "20") == (run, 20)
    assert arguments.find_other_step(run, run / "20") == (run / "20", None), "control: a path"


def test_a_directory_named_by_a_number_is_a_location(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "2024").mkdir()
    assert arguments.find_other_step(run, "2024") == ("2024", None)


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
        ["pin", "20"],
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
