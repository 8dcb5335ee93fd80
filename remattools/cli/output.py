# SPDX-License-Identifier: Apache-2.0
"""What a command found, and how it is printed: text, a table as wide as the terminal, or JSON."""

import dataclasses
import json
import math
import os
import pathlib
import sys
from collections.abc import Callable
from typing import Any

from rich.console import Console


@dataclasses.dataclass(frozen=True)
class CommandResult:
    """What a command found.

    Attributes:
        code: The exit code.
        data: Plain data for `--json`.
        text: For people: a string, or a result whose `str()` is one; tables follow the terminal's width.
        extra_text: Printed after the text.
        files: Files to write, with what writes each. Written after printing, so that a full disk does not lose the
            answer.
    """

    code: int
    data: Any
    text: object
    extra_text: str = ""
    files: tuple[tuple[pathlib.Path, Callable[[pathlib.Path], object]], ...] = ()


def print_result(result: CommandResult, *, as_json: bool) -> None:
    """Print a result to stdout; a closed stdout is not an error."""
    if sys.stdout is None:  # closed by the parent process: the exit code is the answer
        return
    if as_json:
        text = json.dumps(replace_nonfinite(result.data), indent=2, allow_nan=False)
    elif sys.stdout.isatty() and hasattr(result.text, "__rich__"):
        Console(no_color=True, highlight=False).print(result.text)
        text = result.extra_text
    else:
        text = "\n\n".join(filter(None, (str(result.text), result.extra_text)))
    try:
        print(text, end="\n" if text else "", flush=True)
    except BrokenPipeError:  # as in `| head`; without this, Python complains again when it flushes at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def replace_nonfinite(data: Any) -> Any:
    """Replace NaN and infinities by None, since JSON has neither."""
    if isinstance(data, dict):
        return {key: replace_nonfinite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [replace_nonfinite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data
