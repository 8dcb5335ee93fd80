# SPDX-License-Identifier: Apache-2.0
"""What several commands make of their arguments: paths of runs and steps, and pairs NAME=VALUE."""

import os
import pathlib

from ..errors import CheckpointError, SpecError
from ..store import layout
from ..store.run_directory import require_run_directory


def parse_run_path(path: pathlib.Path) -> tuple[pathlib.Path, int | None]:
    """Return the run's directory and the step's number, given the path of a run or of one of its steps.

    Returns:
        The run's directory, and the step; None for a whole run.

    Raises:
        CheckpointError: If the directory does not exist.
    """
    path = path.absolute()
    step = layout.parse_step_number(path.name)
    looks_like_step = (path / layout.MANIFEST).exists() or (path / "_CHECKPOINT_METADATA").exists()
    if step is not None and (looks_like_step or not path.is_dir()) and path.parent.is_dir():
        return path.parent, step
    return require_run_directory(path), None


def require_whole_run(path: pathlib.Path) -> pathlib.Path:
    """Return the directory of a run, for commands that take no single step.

    Raises:
        CheckpointError: If it is not a directory, or is that of one step.
    """
    if path.is_dir() and parse_run_path(path)[1] is not None:
        raise CheckpointError(
            what=f"{path} is one step of a run.",
            why="this command takes a whole run; it would find no steps in the directory of one.",
            fix=f"ckpttools ... {os.path.normpath(path / '..')}",
        )
    return require_run_directory(path)


def parse_pair(text: str) -> tuple[str, str]:
    """Return both sides of NAME=VALUE."""
    name, separator, value = text.partition("=")
    if not separator:
        raise SpecError(what=f"{text!r} has no '='.", why="the option assigns a value to a name.", fix=f"{text}=...")
    return name, value
