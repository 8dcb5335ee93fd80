# SPDX-License-Identifier: Apache-2.0
"""Say what is compiled, how long the last compile took and how many may follow.

Imports the standard library only. At a terminal and in a notebook one line is replaced in place; where the standard
error is a file or a pipe, each line is a record of the logger "remattools", which shows nothing unless the program
configures logging.
"""

import contextlib
import logging
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

LOGGER = logging.getLogger("remattools")
Progress = Callable[[str], None]


class CompileLog:
    """Describes the compiles of one call, as lines.

    Args:
        show: Called with each line.
        clock: Returns the time in seconds.

    Example:
        >>> log = CompileLog(print, clock=iter((0.0, 2.5, 3.0)).__next__)
        >>> with log.compile("the plain model", remaining=7):
        ...     pass
        compile 1: the plain model (at most 7 more)
        >>> log.start("layers.*: save nothing", remaining=6)
        compile 2: layers.*: save nothing (the last took 2.5 s, at most 6 more)
    """

    def __init__(self, show: Progress, clock: Callable[[], float] = time.monotonic) -> None:
        self.show, self._clock = show, clock
        self._count = 0
        self._start: float | None = None
        self._last_s: float | None = None

    def start(self, what: str, *, remaining: int | None = None) -> None:
        """Show a line before a compile; the one before it, if there was one, has ended.

        Args:
            what: What is compiled.
            remaining: The most compiles that follow this one; None if that is unknown.
        """
        self._stop()
        self._count += 1
        notes = [f"the last took {self._last_s:.1f} s"] if self._last_s is not None else []
        notes += [f"at most {remaining} more" if remaining else "no more follow"] if remaining is not None else []
        self.show(f"compile {self._count}: {what}" + (f" ({', '.join(notes)})" if notes else ""))
        self._start = self._clock()

    def _stop(self) -> None:
        if self._start is not None:
            self._last_s = self._clock() - self._start
            self._start = None

    @contextlib.contextmanager
    def compile(self, what: str, *, remaining: int | None = None) -> Iterator[None]:
        """Show a line before a compile, and measure the time that the block takes.

        Args:
            what: What is compiled.
            remaining: The most compiles that follow this one; None if that is unknown.
        """
        self.start(what, remaining=remaining)
        yield
        self._stop()


@contextlib.contextmanager
def open_progress(progress: Progress | bool | None) -> Iterator[Progress]:
    """Return where lines of progress go until the block ends.

    Args:
        progress: A function that is called with each line; None or True for a terminal, a notebook or the logger,
            whichever there is; False for nowhere.
    """
    stream = _find_stream()
    if callable(progress):
        yield progress
    elif progress is False:
        yield lambda _: None
    elif stream is None:
        yield LOGGER.info
    else:
        line = _Line(stream)
        try:
            yield line.show
        finally:
            line.clear()


@contextlib.contextmanager
def log_to_stderr() -> Iterator[None]:
    """Print the records of the logger to the standard error inside the block, for a command."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("remattools: %(message)s"))
    level, propagate = LOGGER.level, LOGGER.propagate
    LOGGER.addHandler(handler)
    LOGGER.setLevel(logging.INFO)
    LOGGER.propagate = False  # the user's own code may have configured the root logger
    try:
        yield
    finally:
        LOGGER.removeHandler(handler)
        LOGGER.setLevel(level)
        LOGGER.propagate = propagate


def _find_stream() -> Any:
    """Return the stream on which a line can be replaced in place; None if there is none."""
    # In a notebook the standard output is a cell's output, which understands a carriage return.
    if type(sys.stdout).__module__.partition(".")[0] == "ipykernel":
        return sys.stdout
    try:
        return sys.stderr if sys.stderr.isatty() and os.environ.get("TERM") != "dumb" else None
    except (AttributeError, ValueError):  # closed, or none at all
        return None


class _Line:
    """One line of a terminal or a cell, whose text is replaced."""

    def __init__(self, stream: Any) -> None:
        self._stream, self._shown = stream, 0

    def show(self, text: str) -> None:
        """Replace the line; a longer text than the line is cut, because only one line can be replaced."""
        width = shutil.get_terminal_size().columns - 1
        text = text if len(text) <= width else text[: width - 3] + "..."
        # Blanks rather than an escape sequence, which not every notebook understands.
        self._write("\r" + text.ljust(self._shown))
        self._shown = len(text)

    def clear(self) -> None:
        """Remove the line."""
        self._write("\r" + " " * self._shown + "\r")

    def _write(self, text: str) -> None:
        with contextlib.suppress(OSError, ValueError):  # progress never ends a computation
            self._stream.write(text)
            self._stream.flush()
