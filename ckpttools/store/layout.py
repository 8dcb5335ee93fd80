# SPDX-License-Identifier: Apache-2.0
"""Where things lie in a run's folder.

    runs/exp1/
        500/                   a committed step: an ordinary Orbax checkpoint and `ckpttools.manifest`
        1000/
        .ckpttools/
            lock               held by the process that writes
            pins.json          steps that retention must keep; pins.second.json is its second copy
            staging/           a save in progress, moved up by one rename when it is complete
            trash/             steps being deleted, moved here by one rename first
            outbox/            links to the files of a step that is being copied to the mirror
            quarantine/        damaged steps, kept for `repair` and for curiosity
            superseded/        steps of a given-up branch whose number was needed again

Everything is on one file system, so that each move is one atomic rename. Plain Orbax sees only the numbered
folders.
"""

import pathlib
import re

MANIFEST = "ckpttools.manifest"
CONTROL_DIRECTORY = ".ckpttools"
MAX_STEP = 10**18 - 1
_STEP = re.compile(r"0|[1-9][0-9]{0,17}")


def get_step_directory(root: pathlib.Path, step: int) -> pathlib.Path:
    """Folder of a committed step."""
    return root / str(step)


def parse_step_number(name: str) -> int | None:
    """The step that a folder's name stands for; None for any other name."""
    return int(name) if _STEP.fullmatch(name) else None


def get_control_path(root: pathlib.Path, part: str = "") -> pathlib.Path:
    """The folder of ckpttools' own files, or a part of it."""
    return root / CONTROL_DIRECTORY / part if part else root / CONTROL_DIRECTORY


def get_spare_directory(root: pathlib.Path, sequence: int) -> pathlib.Path:
    """Second copies of a step's manifest and small files, apart from the step, for `repair`."""
    return get_control_path(root, f"spare/{sequence}")


def find_free_path(directory: pathlib.Path, stem: str) -> pathlib.Path:
    """A path in `directory` that does not exist yet: `stem`, `stem-2`, `stem-3`, ..."""
    candidate, number = directory / stem, 2
    while candidate.exists():
        candidate, number = directory / f"{stem}-{number}", number + 1
    return candidate
