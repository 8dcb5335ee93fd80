# SPDX-License-Identifier: Apache-2.0
"""Read the msgpack files of flax's `save_checkpoint` and `to_bytes`: the only file that imports flax's reader.

They contain a tree of dicts; flax stores lists and tuples as dicts with the keys "0", "1", ...
"""

import pathlib
from collections.abc import Iterator
from typing import Any

from flax import serialization

from ...errors import StructureError
from . import foreign_layouts

_ELSEWHERE = "//MPAPlaceholder:"
"""What flax writes in place of an array that is sharded over processes and stored in a separate directory."""


def read(path: pathlib.Path) -> dict[str, Any]:
    """Return the tree of a file; reads the whole file.

    Raises:
        StructureError: If it is not a complete flax file, or contains only part of the state.
    """
    try:
        tree = serialization.msgpack_restore(path.read_bytes())
    except Exception as error:
        # msgpack, numpy and flax raise several classes of errors for damaged bytes, without a common base.
        raise StructureError(
            what=f"{path} cannot be read as a msgpack file of flax: {type(error).__name__}: {str(error).rstrip('.')}.",
            why="it is damaged, incomplete, or not written by flax, which stores no digest to tell.",
            fix="use another step, or read it with the program that wrote it.",
        ) from error
    if not isinstance(tree, dict) or _has_placeholder(tree):
        raise StructureError(
            what=f"{path} does not contain its whole state.",
            why="it is not a dict, or flax wrote some of its arrays from several processes, to a directory beside it.",
            fix="restore it with flax's restore_checkpoint, and save the result with ct.open(spec).save(step, state).",
        )
    return tree


def describe(path: pathlib.Path) -> list[tuple[str, tuple[int, ...], str]]:
    """Return name, shape and dtype of each leaf of a file; the dtype is "" for a leaf that is not an array.

    Raises:
        StructureError: If it is not a complete flax file, or contains only part of the state.
    """
    return list(_describe(foreign_layouts.BARE_ITEM, read(path)))


def _describe(name: str, tree: Any) -> Iterator[tuple[str, tuple[int, ...], str]]:
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from _describe(f"{name}.{key}", value)
    elif hasattr(tree, "shape") and hasattr(tree, "dtype"):
        yield name, tuple(tree.shape), tree.dtype.name
    else:
        yield name, (), ""


def _has_placeholder(tree: Any) -> bool:
    if isinstance(tree, dict):
        return any(map(_has_placeholder, tree.values()))
    return isinstance(tree, str) and tree.startswith(_ELSEWHERE)
