# SPDX-License-Identifier: Apache-2.0
"""Paths inside a run's directory.

    runs/exp1/
        500/                   a committed step: an ordinary Orbax checkpoint and `ckpttools.manifest`
        1000/
        .ckpttools/
            lock               held by the process that writes
            pins.json          steps that retention must keep; pins.second.json is its second copy
            pins.lock          held while the pins are changed, by any process
            metrics/           metrics recorded after their step was committed, one file for each call
            staging/           a save in progress, moved up by one rename when it is complete
            trash/             steps being deleted, moved here by one rename first
            outbox/            links to the files of a step that is being copied to the mirror
            quarantine/        damaged steps, for `repair` and for inspection
            superseded/        steps of an abandoned branch whose number was needed again

Everything is on one file system, so that each move is one atomic rename. Plain Orbax sees only the numbered
directories.
"""

import os
import pathlib
import re

MANIFEST = "ckpttools.manifest"
CONTROL_DIRECTORY = ".ckpttools"
MAX_STEP = 10**18 - 1
_STEP = re.compile(r"0|[1-9][0-9]{0,17}")


def get_step_directory(root: pathlib.Path, step: int) -> pathlib.Path:
    """Return the directory of a committed step."""
    return root / str(step)


def parse_step_number(name: str) -> int | None:
    """Return the step that a directory's name stands for; None for any other name."""
    return int(name) if _STEP.fullmatch(name) else None


def get_control_path(root: pathlib.Path, part: str = "") -> pathlib.Path:
    """Return the path of the control directory `.ckpttools`, or of an entry in it."""
    return root / CONTROL_DIRECTORY / part if part else root / CONTROL_DIRECTORY


def get_spare_directory(root: pathlib.Path, sequence: int) -> pathlib.Path:
    """Return the directory with the second copies of a step's manifest and small files, for `repair`."""
    return get_control_path(root, f"spare/{sequence}")


def find_free_path(directory: pathlib.Path, stem: str) -> pathlib.Path:
    """Return a path in `directory` that does not exist yet: `stem`, `stem-2`, `stem-3`, ..."""
    candidate, number = directory / stem, 2
    while os.path.lexists(candidate):
        candidate, number = directory / f"{stem}-{number}", number + 1
    return candidate
