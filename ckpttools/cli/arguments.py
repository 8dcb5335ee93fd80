# SPDX-License-Identifier: Apache-2.0
"""What several commands make of their arguments: paths of runs and steps, and pairs NAME=VALUE."""

import os
import pathlib
from collections.abc import Iterable

from ..errors import CheckpointError, SpecError
from ..store import layout, path_kinds
from ..store.run_directory import require_run_directory


def find_other_step(run: str | pathlib.Path, other: str | pathlib.Path) -> tuple[str | pathlib.Path, int | None]:
    """Return the second location of a comparison, and the number of its step if only a number was given.

    Args:
        run: The first location.
        other: The second argument: a location, or the number of a step of the same run.
    """
    if not str(other).isdecimal() or pathlib.Path(other).is_dir():
        return other, None
    if isinstance(run, pathlib.Path) and (found := path_kinds.identify(run)).kind in ("step", "foreign step"):
        return found.path.parent, int(str(other))
    return run, int(str(other))


def require_whole_run(path: pathlib.Path) -> pathlib.Path:
    """Return the directory of a run, for commands that take no single step.

    Raises:
        CheckpointError: If it is not a directory, or is that of one step.
    """
    found = path_kinds.identify(path)
    if found.kind == "step" or (found.kind == "foreign step" and layout.parse_step_number(path.name) is not None):
        raise CheckpointError(
            what=f"{path} is one step of a run.",
            why="this command takes a whole run; it would find no steps in the directory of one.",
            fix=f"ckpttools ... {os.path.normpath(path / '..')}",
        )
    return require_run_directory(path)


def parse_pairs(pairs: Iterable[str]) -> dict[str, str]:
    """Return the values of several NAME=VALUE by name.

    Raises:
        SpecError: If one has no "=", or two have the same name.
    """
    found: dict[str, str] = {}
    for name, value in map(parse_pair, pairs):
        if name in found:
            raise SpecError(
                what=f"{name!r} was given twice: {name}={found[name]} and {name}={value}.",
                why="one of the two would be dropped; nothing was done.",
                fix=f"{name}={value}",
            )
        found[name] = value
    return found


def parse_pair(text: str) -> tuple[str, str]:
    """Return both sides of NAME=VALUE."""
    name, separator, value = text.partition("=")
    if not separator:
        raise SpecError(what=f"{text!r} has no '='.", why="the option assigns a value to a name.", fix=f"{text}=...")
    return name, value
