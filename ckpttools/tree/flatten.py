# SPDX-License-Identifier: Apache-2.0
"""Any state to named leaves and back.

An item of the state is one of three things, and may hold the others inside:

-   a *live object* (an nnx module, optimizer or `Rngs`; an object with `get_state` and `set_state`): filled in place;
-   an `nnx.State`, as `nnx.split` returns it: rebuilt, the variables passed in stay untouched;
-   any other pytree (dicts, tuples, optax states, dataclasses): rebuilt.

Facts that shaped this file: the state of an nnx object holds the object's own `Variable`s, so a functional state has
to be rebuilt from copies; paths of `nnx.state(model)` and of `nnx.split(model)` are equal here on purpose, so that a
run may change between the two; `None` is kept as a leaf, since losing it would lose a difference in structure.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
from flax import nnx

from ..errors import LeafError, StructureError
from .containers import pack, unpack
from .leaves import Leaf, Path, is_array


@runtime_checkable
class Stateful(Protocol):
    """An object that hands out its state and takes it back, such as a data iterator."""

    def get_state(self) -> Any:
        """The state: nested dicts, lists and tuples of arrays and plain values."""

    def set_state(self, state: Any) -> None:
        """Take a state that `get_state` returned."""


type PlaceLeaf = Callable[[Path, Any], Any]
"""Given a leaf's path and the template's value, returns the restored value."""

type StoredStates = Mapping[Path, tuple[Any, Sequence[Any]]]
"""For each stateful object, by its path, its skeleton and the values of its leaves."""


def is_stateful(value: Any) -> bool:
    """Whether `value` speaks `get_state`/`set_state`; nnx objects and pytrees of arrays are no such thing."""
    return not isinstance(value, type | nnx.Pytree | Mapping) and isinstance(value, Stateful)


def _is_unit(value: Any) -> bool:
    """Whether a pytree is not opened further by jax but by `_flatten`."""
    return value is None or isinstance(value, nnx.Pytree | nnx.State | nnx.Variable) or is_stateful(value)


@dataclasses.dataclass(frozen=True)
class FlatItem:
    """An item taken apart.

    Attributes:
        leaves: All leaves in a fixed order.
        skeletons: For each stateful object, by its path, the containers of its state; None in a template.
    """

    leaves: list[Leaf]
    skeletons: dict[Path, Any]


def flatten_item(item: Any, *, template: bool = False) -> FlatItem:
    """The leaves of one item.

    Args:
        item: An nnx object, an `nnx.State`, a stateful object or a pytree; concrete or abstract.
        template: Do not ask stateful objects for their state: theirs is rebuilt from what was stored, not compared
            with it, since an iterator may hold nothing before its first batch and a buffer after it.
    """
    flat = FlatItem([], {})
    _flatten_into(item, (), flat, template)
    return flat


def _flatten_into(value: Any, prefix: Path, flat: FlatItem, template: bool) -> None:
    if isinstance(value, nnx.Pytree):
        value = nnx.state(value)
    if isinstance(value, nnx.State):
        for path, entry in _flatten_state(value):
            _flatten_into(entry, (*prefix, *path), flat, template)
    elif isinstance(value, nnx.Variable):
        _flatten_into(value.get_raw_value(), prefix, flat, template)
    elif is_stateful(value):
        flat.skeletons[prefix], leaves = (None, []) if template else pack(value.get_state(), prefix)
        flat.leaves.extend(leaves)
    else:
        entries, _ = open_pytree(value)
        if entries is None:
            flat.leaves.append(Leaf(prefix, value))
        for keys, entry in entries or ():
            _flatten_into(entry, (*prefix, *keys), flat, template)


def _flatten_state(state: Any) -> list[tuple[Path, Any]]:
    return [(tuple(map(_require_key, path)), entry) for path, entry in nnx.to_flat_state(state)]


def open_pytree(value: Any) -> tuple[list[tuple[Path, Any]] | None, Any]:
    """The children of a pytree with their paths, and its tree definition; None for the children of a leaf."""
    if is_array(value) or value is None:
        return None, None
    try:
        entries, treedef = jax.tree_util.tree_flatten_with_path(value, is_leaf=_is_unit)
    except ValueError as error:
        raise LeafError(
            what=f"a part of the state cannot be taken apart: {error}",
            why="JAX sorts the keys of a dict, and keys of different types, such as 0 and '0', have no order.",
            fix="give all keys of a dict the same type.",
        ) from error
    if len(entries) == 1 and entries[0][0] == ():
        return None, None
    return [(tuple(map(_convert_key, keys)), entry) for keys, entry in entries], treedef


def _convert_key(key: Any) -> str | int:
    """One key of a pytree path as a str or int."""
    for attribute in ("key", "idx", "name"):
        if hasattr(key, attribute):
            return _require_key(getattr(key, attribute))
    return str(key)


def _require_key(name: Any) -> str | int:
    if isinstance(name, str | int) and not isinstance(name, bool):
        if isinstance(name, str) and not name.isascii() and any("\ud800" <= letter <= "\udfff" for letter in name):
            raise LeafError(
                what=f"the state has a key {name!r}.",
                why="half a character has no form in UTF-8, in which names are stored.",
                fix="use another key.",
            )
        return name
    raise LeafError(
        what=f"the state has a key {name!r} of type {type(name).__name__}.",
        why="leaves are named by their path, and a path is made of strings and ints.",
        fix=f"use str({name!r}).",
    )


def fill(item: Any, place: PlaceLeaf, stored: StoredStates) -> Any:
    """The item with restored leaves: live objects are filled in place, all else is rebuilt.

    Args:
        item: What the caller passed in.
        place: Called once for each leaf, in the order of `flatten`, when its place is ready for it.
        stored: For each stateful object its skeleton and the values of its leaves.

    Returns:
        `item` itself if it is a live object, else a new value of the same structure.
    """
    return _fill(item, (), place, stored)


def _fill(value: Any, prefix: Path, place: PlaceLeaf, stored: StoredStates) -> Any:
    if isinstance(value, nnx.Pytree):
        for path, entry in _flatten_state(nnx.state(value)):
            # One leaf at a time, so that the old array is freed before the next one needs its room.
            nnx.update(value, _nest(path, _fill_entry(entry, (*prefix, *path), place, stored)))
        return value
    if isinstance(value, nnx.State):
        rebuilt = []
        for path, entry in _flatten_state(value):
            new = _fill_entry(entry, (*prefix, *path), place, stored)
            rebuilt.append((path, entry.replace(new) if isinstance(entry, nnx.Variable) else new))
        return nnx.from_flat_state(rebuilt)
    if isinstance(value, nnx.Variable):
        value.set_raw_value(_fill_entry(value, prefix, place, stored))
        return value
    if is_stateful(value):
        if prefix not in stored:
            return value  # Surgery leaves it as it is.
        skeleton, leaves = stored[prefix]
        value.set_state(unpack(skeleton, leaves))
        return value
    entries, treedef = open_pytree(value)
    if entries is None:
        return place(prefix, value)
    children = [_fill(entry, (*prefix, *keys), place, stored) for keys, entry in entries]
    return jax.tree_util.tree_unflatten(treedef, children)


def _fill_entry(entry: Any, path: Path, place: PlaceLeaf, stored: StoredStates) -> Any:
    return _fill(entry.get_raw_value() if isinstance(entry, nnx.Variable) else entry, path, place, stored)


def split_item(item: Any) -> tuple[Any, Callable[[Any], Any]]:
    """An item without live objects at its root, and the function that makes it again from such a value."""
    if isinstance(item, nnx.Pytree):
        graphdef, state = nnx.split(item)
        return state, lambda filled: nnx.merge(graphdef, filled)
    return item, lambda filled: filled


def _nest(path: Path, value: Any) -> Any:
    for key in reversed(path):
        value = {key: value}
    return value


def require_unique_names(item: str, paths: list[Path]) -> None:
    """Refuse paths that Orbax would store under one name.

    Orbax joins keys with dots and, of two equal names, silently keeps one: `{"a.b": x, "a": {"b": y}}` came back
    with y twice.

    Raises:
        StructureError: If two leaves share a name.
    """
    seen: dict[str, Path] = {}
    for path in paths:
        name = ".".join(map(str, path))
        if name in seen:
            raise StructureError(
                what=f"two leaves of {item!r} share the name {name!r}: {seen[name]!r} and {path!r}.",
                why="Orbax joins keys with dots and would keep only one of the two.",
                fix="rename one of the keys.",
            )
        seen[name] = path
