# SPDX-License-Identifier: Apache-2.0
"""The nested containers in which Orbax writes and reads the leaves of an item.

We write dicts only. A step that was adopted from Orbax may hold lists and tuples, which Orbax does not treat as dicts.
"""

import pathlib
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np

from ...tree.leaf_paths import Path
from ...tree.records import Record
from ...tree.snapshot import Snapshot, SnapshotLeaf
from . import foreign_layouts

_SEQUENCE = 1
"""Orbax's type code for the key of a list or tuple entry; 2 is that of a dict."""


def build_trees(snapshot: Snapshot, get_array: Callable[[SnapshotLeaf], Any]) -> dict[str, Any]:
    """Return the leaves to write as nested dicts, for each item that has any."""
    items: dict[str, Any] = {}
    for name, item in snapshot.items.items():
        tree: dict[str, Any] = {}
        for leaf in item.leaves:
            if (array := get_array(leaf)) is not None:
                put_leaf(tree, leaf.record.path, _to_native(leaf.record, array))
        if tree:
            items[name] = tree
    return items


def has_sequences(directory: pathlib.Path, items: Iterable[str]) -> bool:
    """Return whether Orbax's metadata mentions lists or tuples; read without Orbax, since the step may be damaged."""
    for item in items:
        try:
            place = directory if foreign_layouts.is_bare(directory) else directory / item
            text = (place / "_METADATA").read_text(errors="replace")
        except OSError:
            continue
        if re.search(rf'"key_type":\s*{_SEQUENCE}\b', text):
            return True
    return False


def match_stored_containers(described: Mapping[str, Any], items: Mapping[str, Any]) -> dict[str, Any]:
    """Return the same trees with lists and tuples where the file has them; empty if it has none, or other leaves.

    Args:
        described: Orbax's metadata of each item.
        items: Arrays of the shapes and dtypes to read, by item.
    """

    def match_containers(stored: Any, target: Any) -> Any:
        if isinstance(stored, list | tuple):
            entries = [match_containers(each, target.get(str(at), {})) for at, each in enumerate(stored)]
            found.append(True)
            return entries if isinstance(stored, list) else tuple(entries)
        if isinstance(stored, Mapping) and isinstance(target, dict):
            return {name: match_containers(stored[name], each) for name, each in target.items()}
        # Orbax reads a sequence as a whole, so entries that were not asked for are read, too.
        return np.empty(stored.shape, stored.dtype) if isinstance(target, dict) else target

    found: list[bool] = []
    try:
        trees = {name: match_containers(described[name], tree) for name, tree in items.items()}
    except (KeyError, TypeError, AttributeError):
        return {}
    return trees if found else {}


def _to_native(record: Record, array: Any) -> Any:
    """Return the array in the form that Orbax stores natively, so that plain Orbax reads typed keys as such."""
    if record.kind != "key":
        return array
    return jax.random.wrap_key_data(array if isinstance(array, jax.Array) else jax.device_put(array), impl=record.dtype)


def put_leaf(tree: dict[str, Any], path: Path, value: Any) -> None:
    """Add a leaf to nested dicts."""
    *parents, last = map(str, path or ("value",))
    for name in parents:
        tree = tree.setdefault(name, {})
    tree[last] = value


def get_leaf(tree: Any, path: Path) -> Any:
    """Return a leaf of nested dicts, lists and tuples."""
    for name in map(str, path or ("value",)):
        tree = tree[int(name) if isinstance(tree, list | tuple) else name]
    return tree
