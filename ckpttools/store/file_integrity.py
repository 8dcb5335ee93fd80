# SPDX-License-Identifier: Apache-2.0
"""Which files of a step differ from what was written, by the digests in the manifest. Needs no Orbax."""

from collections.abc import Callable

from ..errors import StorageError
from . import digest
from .catalogue import Entry


def find_damaged_files(entry: Entry, on_bytes: Callable[[int], None] = lambda size: None) -> tuple[str, ...]:
    """Read every file of a committed step and return the names of those that differ from what was written.

    Args:
        entry: The step.
        on_bytes: Called with the size of each file before it is read.
    """
    damaged = []
    for name, (size, expected) in entry.manifest.summary.files.items() if entry.manifest else ():
        on_bytes(size)
        try:
            if digest.hash_file(digest.get_algorithm(expected), entry.path / name) != expected:
                damaged.append(name)
        except (FileNotFoundError, NotADirectoryError):
            damaged.append(name)
        except OSError as error:
            raise StorageError(
                what=f"{entry.path / name} cannot be read: {error}.",
                why="that is the disk or its permissions, not damage: an older step would fail in the same way.",
                fix="fix the cause and restore again; nothing was changed.",
            ) from error
    return tuple(damaged)
