# SPDX-License-Identifier: Apache-2.0
"""Recognise the checkpoints of other programs by their names and first bytes, without importing Orbax or flax.

Three layouts are known:

-   "items": a directory for each item (Orbax's `CheckpointManager`, v1's `Checkpointer` and `save_checkpointables`);
-   "bare": one tree directly in the directory (`StandardCheckpointer`, `PyTreeCheckpointer`, flax with Orbax);
-   "msgpack": one file (flax's `save_checkpoint` and `to_bytes`).

A step's name ends in its number: `10`, `000010`, `ckpt_10`, `checkpoint_7`. Orbax writes to a directory with a
temporary name and renames it at the end; an unfinished directory is not a step.
"""

import dataclasses
import json
import os
import pathlib
import re
from typing import Literal

from .. import layout

type Layout = Literal["items", "bare", "msgpack"]

BARE_ITEM = "default"
"""Name of the item that a tree without one becomes; Orbax's managers use the same."""

ORBAX_METADATA = "_CHECKPOINT_METADATA"
_TREE_METADATA = "_METADATA"
_TEMPORARY = ".orbax-checkpoint-tmp"
_NUMBERED = re.compile(r"(?:(?!\.).*\D(?<!\d\.))?0*(?P<step>[0-9]{1,18})")
"""Not a hidden name, nor a fraction: flax's `checkpoint_7.5` is a checkpoint without the number of a step."""
_WRITERS: dict[Layout, str] = {
    "items": "plain Orbax",
    "bare": "plain Orbax as one tree without items",
    "msgpack": "flax as one msgpack file",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ForeignFiles:
    """The checkpoints of other programs in a directory.

    Attributes:
        steps: Checkpoints whose names end in a number, as pairs of number and path; without plain numbers such as `10`.
        unnumbered: Checkpoints without a number, such as `best/`.
        unfinished: Directories that Orbax has not finished.
    """

    steps: tuple[tuple[int, pathlib.Path], ...] = ()
    unnumbered: tuple[pathlib.Path, ...] = ()
    unfinished: tuple[pathlib.Path, ...] = ()


def find_foreign_files(root: pathlib.Path) -> ForeignFiles:
    """Return the checkpoints of other programs directly in a directory."""
    if not root.is_dir():
        return ForeignFiles()
    with os.scandir(root) as found:
        paths = [root / each.name for each in found if not each.is_symlink() and each.name[0] != "."]
    paths.sort()
    paths = [path for path in paths if layout.parse_step_number(path.name) is None or path.is_file()]
    numbers = {path: parse_number(path.name) for path in paths}
    known = [path for path in paths if recognize(path) is not None]
    steps = ((number, path) for path in known if (number := numbers[path]) is not None)
    return ForeignFiles(
        steps=tuple(sorted(steps)),
        unnumbered=tuple(path for path in known if numbers[path] is None),
        unfinished=tuple(path for path in paths if is_unfinished(path)),
    )


def parse_number(name: str) -> int | None:
    """Return the number at the end of a name, such as `ckpt_000010`; None if it has none."""
    match = None if _TEMPORARY in name else _NUMBERED.fullmatch(name)
    return int(match["step"]) if match else None


def is_unfinished(path: pathlib.Path) -> bool:
    """Return whether Orbax has not finished this directory: it was interrupted, or is still writing.

    On stores without rename, Orbax writes under the final name and adds the time of the commit at the end.
    """
    if _TEMPORARY in path.name:
        return path.is_dir()
    try:
        stamps = json.loads((path / ORBAX_METADATA).read_bytes())
        return stamps["init_timestamp_nsecs"] is not None and stamps["commit_timestamp_nsecs"] is None
    except (OSError, ValueError, TypeError, KeyError):
        return False


def recognize(path: pathlib.Path) -> Layout | None:
    """Return the layout of another program's checkpoint; None for anything else, including our own steps."""
    if path.is_file():
        named = path.suffix == ".msgpack" or path.name[-1].isdecimal()
        return "msgpack" if named and _holds_msgpack_dict(path) else None
    if (path / layout.MANIFEST).exists() or is_unfinished(path) or is_in_checkpoint(path):
        return None
    if (path / _TREE_METADATA).is_file():
        return "bare"
    return "items" if is_orbax_checkpoint(path) or _has_old_items(path) else None


def describe_writer(path: pathlib.Path) -> str:
    """Return who wrote a checkpoint and how, for messages; "another program" if it is not known."""
    found = recognize(path)
    return _WRITERS[found] if found else "another program"


def is_orbax_checkpoint(directory: pathlib.Path) -> bool:
    """Return whether a directory has the metadata that Orbax writes for a whole checkpoint (v0 and v1)."""
    return (directory / ORBAX_METADATA).is_file()


def is_bare(directory: pathlib.Path) -> bool:
    """Return whether a directory, possibly adopted, contains one tree without items."""
    return (directory / _TREE_METADATA).is_file()


def is_in_checkpoint(path: pathlib.Path) -> bool:
    """Return whether the parent of a path is a step, so that the path is one of its items."""
    return is_orbax_checkpoint(path.parent) or (path.parent / layout.MANIFEST).exists()


def _has_old_items(path: pathlib.Path) -> bool:
    """Return whether a numbered directory has items written by an old Orbax, without metadata of the whole step."""
    if parse_number(path.name) is None or not path.is_dir():
        return False
    # A child with metadata of a whole checkpoint is a step, and `path` a run such as `exp2`.
    return any((child / _TREE_METADATA).is_file() and not is_orbax_checkpoint(child) for child in path.iterdir())


def _holds_msgpack_dict(path: pathlib.Path) -> bool:
    """Return whether a file begins like flax's files: with a dict that is not empty and whose first key is short."""
    try:
        with path.open("rb") as file:
            head = file.read(6)
    except OSError:
        # An unreadable file must neither hide the steps beside it nor look absent.
        return path.name.startswith("checkpoint_")
    sizes = {0xDE: 3, 0xDF: 5}
    if not head or not (0x81 <= head[0] <= 0x8F or head[0] in sizes):
        return False
    key = head[sizes.get(head[0], 1) :][:1]
    return bool(key) and (0xA0 <= key[0] <= 0xBF or key[0] == 0xD9)
