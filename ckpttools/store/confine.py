# SPDX-License-Identifier: Apache-2.0
"""A run's control directory must not lead out of the run.

Staging and trash are emptied, the lock, the pins and second copies are written. A run may come from anybody: if one of
these were a link, files outside the run would be deleted or overwritten. Checked before every write; reading follows
no such link.
"""

import os
import pathlib

from ..errors import StorageError
from . import layout


def require_confined(root: pathlib.Path) -> None:
    """Raise `StorageError` if the run's control directory, or anything directly in it, is a link."""
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
        why="files outside the run would be written and deleted; nothing was touched.",
        fix="remove the link; if the run came from somebody else, do not trust it.",
    )
