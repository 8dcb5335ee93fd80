# SPDX-License-Identifier: Apache-2.0
"""A run's own folder must not lead out of the run.

Staging and trash are emptied, the lock and the list of pins are written, second copies are laid down: if one of them
were a link, and a run may come from anybody, what is deleted or overwritten would be somebody else's. Asked by
everything that is about to write; reading follows no such link.
"""

import os
import pathlib

from ..errors import StorageError
from . import layout


def require_confined(root: pathlib.Path) -> None:
    """Raise `StorageError` if the run's control folder, or anything directly in it, is a link."""
    control = layout.get_control_path(root)
    if control.is_symlink():
        raise _make_link_error(control)
    if not control.is_dir():
        return
    with os.scandir(control) as entries:
        for entry in entries:
            if entry.is_symlink():
                raise _make_link_error(pathlib.Path(entry.path))


def _make_link_error(path: pathlib.Path) -> StorageError:
    return StorageError(
        what=f"{path} is a link.",
        why="what is written and deleted there would lie outside the run; nothing was touched.",
        fix="remove the link; if the run came from somebody else, do not trust it.",
    )
