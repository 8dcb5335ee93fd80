# SPDX-License-Identifier: Apache-2.0
"""Paths of leaves: as keys, as names that can be compared, and as one string for messages."""

from collections.abc import Iterable

type Path = tuple[str | int, ...]
"""Keys from an item's root to a leaf."""


def format_leaf_name(item: str, path: Path) -> str:
    """Return the name of a leaf in messages, such as "model.layers.0.kernel"."""
    return ".".join([item, *map(str, path)])


type Names = tuple[str, ...]
"""A path with all keys as strings: Orbax stores no ints, so `0` and `"0"` are one key."""


def to_names(path: Path) -> Names:
    """Return the form in which paths are compared."""
    return tuple(map(str, path))


def is_below(path: Path, roots: Iterable[Path]) -> bool:
    """Whether a leaf belongs to one of the objects at `roots`."""
    return any(to_names(path)[: len(root)] == to_names(root) for root in roots)
