# SPDX-License-Identifier: Apache-2.0
"""Progress is one line in place for people, and log records for files."""

import io
import logging
import sys

import pytest

from remattools.terminal.progress import CompileLog, log_to_stderr, open_progress


class Terminal(io.StringIO):
    """A stream at which a person looks."""

    def isatty(self) -> bool:
        return True


class Cell(io.StringIO):
    """The output of a notebook's cell."""


Cell.__module__ = "ipykernel.iostream"


def _show(*lines: str) -> None:
    with open_progress(None) as show:
        for line in lines:
            show(line)


def test_a_line_says_what_how_long_and_how_many() -> None:
    lines: list[str] = []
    log = CompileLog(lines.append, clock=iter((0.0, 12.34, 20.0, 21.0, 22.0)).__next__)
    with log.compile("plain", remaining=2):
        pass
    log.start("nothing", remaining=1)
    log.start("dots", remaining=0)
    assert lines == [
        "compile 1: plain (at most 2 more)",
        "compile 2: nothing (the last took 12.3 s, at most 1 more)",
        "compile 3: dots (the last took 1.0 s, no more follow)",
    ]


def test_a_terminal_shows_one_line_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "20")
    _show("a line of many words that is too long", "short")
    text = terminal.getvalue()
    assert "\n" not in text
    first, second, *_, end = text.split("\r")[1:]
    assert first == "a line of many w..."
    assert second == "short".ljust(len(first))  # nothing of the longer line is left
    assert end == ""  # the cursor is where it was, on an empty line


def test_a_notebook_shows_one_line_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    cell = Cell()
    monkeypatch.setattr(sys, "stdout", cell)
    _show("first")
    assert cell.getvalue().startswith("\rfirst")


def test_a_pipe_gets_log_records(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    pipe = io.StringIO()
    monkeypatch.setattr(sys, "stderr", pipe)
    with caplog.at_level(logging.INFO, logger="remattools"):
        _show("first", "second")
    assert [(record.name, record.message) for record in caplog.records] == [
        ("remattools", "first"),
        ("remattools", "second"),
    ]
    assert pipe.getvalue() == ""  # control: no line in place


def test_a_command_prints_log_records(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = io.StringIO()
    monkeypatch.setattr(sys, "stderr", pipe)
    with log_to_stderr():
        _show("first")
    _show("second")  # control: a library prints nothing by itself
    assert pipe.getvalue() == "remattools: first\n"


def test_lines_go_to_a_function_or_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    lines: list[str] = []
    for progress in (lines.append, False):
        with open_progress(progress) as show:
            show("line")
    assert lines == ["line"]
    assert terminal.getvalue() == ""


def test_a_closed_stderr_is_not_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    _show("line")
