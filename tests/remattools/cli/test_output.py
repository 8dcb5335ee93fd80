# SPDX-License-Identifier: Apache-2.0
"""How results are printed: text, JSON, and nothing on a closed stdout."""

import json
import pathlib
import sys

from remattools.cli import output
from remattools.cli.output import CommandResult


def test_nonfinite_numbers_become_null():
    assert output.replace_nonfinite({"a": [float("nan"), 1.5], "b": (float("inf"), "x", None)}) == {
        "a": [None, 1.5],
        "b": [None, "x", None],
    }


def test_text_is_followed_by_its_extra_text(capsys):
    output.print_result(CommandResult(0, {"a": 1}, "text", "extra"), as_json=False)
    assert capsys.readouterr().out == "text\n\nextra\n"


def test_json_has_the_data_only(capsys):
    output.print_result(CommandResult(0, {"a": float("nan")}, "text", "extra"), as_json=True)
    assert json.loads(capsys.readouterr().out) == {"a": None}


def test_a_missing_stdout_is_not_an_error(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdout", None)
    written: list[pathlib.Path] = []
    output.print_result(CommandResult(0, None, "text", files=((pathlib.Path("a"), written.append),)), as_json=False)
    assert written == []  # printing writes no files
