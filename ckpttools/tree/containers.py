# SPDX-License-Identifier: Apache-2.0
"""Nested plain containers to a JSON skeleton with numbered leaves, and back.

For states whose structure is only known when they are saved, such as that of a data iterator.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import CorruptStepError, LeafError
from .leaf_paths import Path
from .leaves import Leaf

_MAX_DEPTH = 100


def pack(value: Any, prefix: Path) -> tuple[Any, list[Leaf]]:
    """Split nested dicts, lists and tuples into a skeleton and leaves.

    Args:
        value: The containers; dict keys are str or int.
        prefix: Path that all leaves begin with.

    Returns:
        The skeleton, in which a leaf is its index in the list, and that list.

    Raises:
        LeafError: If the containers are nested too deep, or a key is not a str or int.
    """
    leaves: list[Leaf] = []

    def visit(part: Any, path: Path) -> Any:
        if len(path) - len(prefix) > _MAX_DEPTH:
            raise LeafError(
                what=f"the state is nested deeper than {_MAX_DEPTH} levels at {path[:6]!r}...",
                why="it most likely contains itself.",
                fix="return a flat state from get_state().",
            )
        if isinstance(part, Mapping):
            return {
                "dict": [[_require_key(key), visit(entry, (*path, _require_key(key)))] for key, entry in part.items()]
            }
        if type(part) in (list, tuple):
            kind = "list" if type(part) is list else "tuple"
            return {kind: [visit(entry, (*path, index)) for index, entry in enumerate(part)]}
        leaves.append(Leaf(path, part))
        return len(leaves) - 1

    return visit(value, prefix), leaves


def _require_key(key: Any) -> str | int:
    if type(key) not in (str, int):
        raise LeafError(
            what=f"a state returned by get_state() has a key {key!r} of type {type(key).__name__}.",
            why="keys are written as JSON and must be strings or ints.",
            fix=f"use str({key!r}).",
        )
    return key  # type: ignore[no-any-return]


def unpack(skeleton: Any, values: Sequence[Any]) -> Any:
    """Rebuild the containers.

    Args:
        skeleton: What `pack` returned.
        values: The leaves in the order of `pack`.

    Raises:
        CorruptStepError: If the skeleton is not one that `pack` returns.
    """

    def visit(part: Any, depth: int) -> Any:
        if depth > _MAX_DEPTH:
            raise CorruptStepError(what=f"a stored state is nested deeper than {_MAX_DEPTH} levels.")
        if type(part) is int and 0 <= part < len(values):
            return values[part]
        match part if isinstance(part, dict) and len(part) == 1 else None:
            case {"dict": [*entries]} if all(map(_is_entry, entries)):
                return {key: visit(entry, depth + 1) for key, entry in entries}
            case {"list": [*entries]}:
                return [visit(entry, depth + 1) for entry in entries]
            case {"tuple": [*entries]}:
                return tuple(visit(entry, depth + 1) for entry in entries)
        raise CorruptStepError(what=f"the skeleton of a stored state is not valid: {part!r:.100}.")

    return visit(skeleton, 0)


def _is_entry(entry: Any) -> bool:
    return isinstance(entry, list) and len(entry) == 2 and type(entry[0]) in (str, int)
