# SPDX-License-Identifier: Apache-2.0
"""Any state to named leaves and back.

An item of the state is one of three things, and may contain the others:

-   a *live object* (an nnx module, optimizer or `Rngs`; an object with `get_state` and `set_state`): filled in place;
-   an `nnx.State`, as `nnx.split` returns it: rebuilt, the variables passed in are not changed;
-   any other pytree (dicts, tuples, optax states, dataclasses): rebuilt.

Facts that shaped this file: the state of an nnx object holds the object's own `Variable`s, so a functional state has
to be rebuilt from copies; paths of `nnx.state(model)` and of `nnx.split(model)` are equal here on purpose, so that a
run may change between the two; `None` is a leaf, since dropping it would hide a difference in structure.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
from flax import nnx

from ..errors import LeafError, StructureError
from ..spec.state import Exclude, find_exclusion
from .containers import pack, unpack
from .leaf_paths import Path, format_leaf_name
from .leaves import Leaf, describe, find_alias_paths, is_array, list_variable_types
from .records import Record
from .replacing import Replacements


@runtime_checkable
class Stateful(Protocol):
    """An object that returns its state and can be set to it, such as a data iterator."""

    def get_state(self) -> Any:
        """Return the state: nested dicts, lists and tuples of arrays and plain values."""

    def set_state(self, state: Any) -> None:
        """Continue from a state that `get_state` returned."""


type FindReason = Callable[[Path, tuple[str, ...]], str]
"""From a path and the types of its variable to the type or pattern that excludes it; "" if it is not excluded."""

type PlaceLeaf = Callable[[Path, Any], Any]
"""From a leaf's path and the template's value to the restored value."""

type GetStoredState = Callable[[Path], tuple[Any, Sequence[Any]] | None]
"""From a stateful object's path to its skeleton and the values of its leaves; None if it keeps its state."""


def is_stateful(value: Any) -> bool:
    """Whether `value` is saved by `get_state` and restored by `set_state`; nnx objects and mappings never are."""
    return not isinstance(value, type | nnx.Pytree | Mapping) and isinstance(value, Stateful)


def is_stateful_item(item: Any) -> bool:
    """Whether a whole item is one stateful object, bare or in a `Variable`."""
    return is_stateful(item.get_raw_value() if isinstance(item, nnx.Variable) else item)


def _is_unit(value: Any) -> bool:
    """Whether a node of a pytree is flattened here rather than by JAX."""
    return value is None or isinstance(value, nnx.Pytree | nnx.State | nnx.Variable) or is_stateful(value)


@dataclasses.dataclass(frozen=True)
class FlatItem:
    """A flattened item.

    Attributes:
        leaves: All leaves, in an order that depends on the structure only.
        skeletons: For each stateful object, by its path, the containers of its state; None in a template.
        excluded: The excluded parts, each with the type or pattern that excluded it.
        excluded_parameters: The trained parameters (`nnx.Param`) among them.
        matched_states: Parts of the states of stateful objects that a pattern names; they are in `leaves`, since such a
            state is saved as a whole.
    """

    leaves: list[Leaf]
    skeletons: dict[Path, Any]
    excluded: list[tuple[Path, str]] = dataclasses.field(default_factory=list)
    excluded_parameters: list[tuple[Path, str]] = dataclasses.field(default_factory=list)
    matched_states: list[tuple[Path, str]] = dataclasses.field(default_factory=list)


def flatten_item(item: Any, *, template: bool = False, find_reason: FindReason | None = None) -> FlatItem:
    """Return the leaves of one item.

    Args:
        item: An nnx object, an `nnx.State`, a stateful object or a pytree; concrete or abstract.
        template: Leave out the states of stateful objects: they are rebuilt from what was stored, not compared
            with it, since an iterator may hold nothing before its first batch and a buffer after it.
        find_reason: Decides what is excluded; None excludes nothing.

    Raises:
        LeafError: If a part of the item cannot be flattened, or has a key that cannot be stored.
    """
    flattening = _Flattening(FlatItem([], {}), template, find_reason)
    flattening.add(item, ())
    return flattening.flat


def flatten_with_records(item: str, value: Any, rules: Sequence[Exclude] = ()) -> tuple[FlatItem, list[Record]]:
    """Return the leaves of one item and a record of each, in the same order.

    Args:
        item: Name of the item.
        value: An nnx object, an `nnx.State`, a stateful object or a pytree.
        rules: Which variables are excluded.

    Raises:
        LeafError: If a leaf cannot be stored.
        StructureError: If two leaves share a name.
    """
    flat = flatten_item(value, find_reason=lambda path, types: find_exclusion(rules, (item, *path), types))
    records = [describe(item, leaf) for leaf in flat.leaves]
    _require_unique_names(item, records)
    return flat, records


type ListAliases = Callable[[], Sequence[Path]]
"""Returns other paths of the same variable."""


@dataclasses.dataclass(frozen=True)
class _Flattening:
    """One call of `flatten_item`; its fields are the arguments, and what is found."""

    flat: FlatItem
    template: bool
    find_reason: FindReason | None

    def add(self, value: Any, prefix: Path, types: tuple[str, ...] = (), list_aliases: ListAliases = tuple) -> None:
        """Add the leaves of a part of the item."""
        types = list_variable_types(type(value)) if isinstance(value, nnx.Variable) else types
        if reason := self._find_reason(prefix, types, list_aliases):
            self.flat.excluded.append((prefix, reason))
            self.flat.excluded_parameters.extend((path, reason) for path in _list_parameters(value, prefix))
        elif isinstance(value, nnx.Pytree):
            # Of several paths to a variable, the state has the first.
            find_aliases = functools.cache(lambda: find_alias_paths(value))
            for path, entry in _flatten_state(nnx.state(value)):
                self._add_entry(entry, prefix, path, lambda at=path: find_aliases()(at))  # type: ignore[misc]
        elif isinstance(value, nnx.State):
            for path, entry in _flatten_state(value):
                self._add_entry(entry, prefix, path, tuple)
        elif isinstance(value, nnx.Variable):
            self.add(value.get_raw_value(), prefix, types, list_aliases)
        elif is_stateful(value):
            self._add_state(value, prefix)
        else:
            entries, _ = open_pytree(value)
            if entries is None:
                self.flat.leaves.append(Leaf(prefix, value, types, tuple(list_aliases()) if self.template else ()))
            for keys, entry in entries or ():
                self.add(entry, (*prefix, *keys), types, _append_to_each(list_aliases, keys))

    def _add_entry(self, entry: Any, prefix: Path, path: Path, list_aliases: ListAliases) -> None:
        self.add(entry, (*prefix, *path), (), lambda: [(*prefix, *alias) for alias in list_aliases()])

    def _add_state(self, value: Stateful, prefix: Path) -> None:
        self.flat.skeletons[prefix], leaves = (None, []) if self.template else pack(value.get_state(), prefix)
        self.flat.leaves.extend(leaves)
        if self.find_reason is not None:
            reasons = [(leaf.path, self.find_reason(leaf.path, ())) for leaf in leaves]
            self.flat.matched_states.extend((path, reason) for path, reason in reasons if reason)

    def _find_reason(self, path: Path, types: tuple[str, ...], list_aliases: ListAliases) -> str:
        """Return what leaves a part out: of the paths to a variable, all have to be left out."""
        reason = self.find_reason(path, types) if self.find_reason is not None else ""
        if self.find_reason is None or not reason or reason in types:
            return reason
        return reason if all(self.find_reason(alias, types) for alias in list_aliases()) else ""


def _append_to_each(list_aliases: ListAliases, keys: Path) -> ListAliases:
    return lambda: [(*alias, *keys) for alias in list_aliases()]


def _list_parameters(value: Any, prefix: Path) -> list[Path]:
    """Return the paths of the trained parameters of a part that is left out."""
    if isinstance(value, nnx.Param):
        return [prefix]
    if not isinstance(value, nnx.Pytree | nnx.State):
        return []
    state = nnx.state(value) if isinstance(value, nnx.Pytree) else value
    return [(*prefix, *path) for path, entry in _flatten_state(state) if isinstance(entry, nnx.Param)]


def _flatten_state(state: Any) -> list[tuple[Path, Any]]:
    return [(tuple(map(_require_key, path)), entry) for path, entry in nnx.to_flat_state(state)]


def open_pytree(value: Any) -> tuple[list[tuple[Path, Any]] | None, Any]:
    """Return the children of a pytree with their paths, and its tree definition; (None, None) for a leaf."""
    if is_array(value) or value is None:
        return None, None
    try:
        entries, treedef = jax.tree_util.tree_flatten_with_path(value, is_leaf=_is_unit)
    except ValueError as error:
        raise LeafError(
            what=f"a part of the state cannot be flattened: {error}",
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
        if isinstance(name, str) and not name.isascii() and any("\ud800" <= char <= "\udfff" for char in name):
            raise LeafError(
                what=f"the state has a key {name!r}.",
                why="names are stored as UTF-8, which cannot encode an unpaired surrogate.",
                fix="use another key.",
            )
        return name
    raise LeafError(
        what=f"the state has a key {name!r} of type {type(name).__name__}.",
        why="leaves are named by their path, and a path consists of strings and ints.",
        fix=f"use str({name!r}).",
    )


@dataclasses.dataclass(frozen=True)
class Filling:
    """How one item is filled.

    Attributes:
        item: Name of the item.
        place: Called once for each leaf, in the order of `flatten_item`, right before the leaf is replaced.
        get_stored: Called once for each stateful object.
        replacements: Replaces the values of live objects.
    """

    item: str
    place: PlaceLeaf
    get_stored: GetStoredState
    replacements: Replacements


def fill(value: Any, filling: Filling) -> Any:
    """Return an item with restored leaves: live objects are filled in place, everything else is rebuilt.

    Args:
        value: What the caller passed in.
        filling: Where its leaves come from.

    Returns:
        `value` itself if it is a live object, else a new value of the same structure.
    """
    return _fill(value, (), filling)


def _fill(value: Any, prefix: Path, filling: Filling) -> Any:
    if isinstance(value, nnx.Pytree):
        # One leaf at a time, so that the old array is freed before the next one is allocated. Variables are set
        # directly, since `nnx.update` visits all siblings of a leaf.
        for path, entry in _flatten_state(nnx.state(value)):
            if isinstance(entry, nnx.Variable):
                _fill_variable(entry, (*prefix, *path), filling)
            else:
                new = _fill(entry, (*prefix, *path), filling)
                filling.replacements.set_entry(format_leaf_name(filling.item, (*prefix, *path)), value, path, new)
        return value
    if isinstance(value, nnx.State):
        rebuilt = []
        for path, entry in _flatten_state(value):
            raw = entry.get_raw_value() if isinstance(entry, nnx.Variable) else entry
            new = _fill(raw, (*prefix, *path), filling)
            rebuilt.append((path, entry.replace(new) if isinstance(entry, nnx.Variable) else new))
        return nnx.from_flat_state(rebuilt)
    if isinstance(value, nnx.Variable):
        return _fill_variable(value, prefix, filling)
    if is_stateful(value):
        # Surgery may leave it as it is.
        if (stored := filling.get_stored(prefix)) is not None:
            filling.replacements.set_state(format_leaf_name(filling.item, prefix), value, unpack(*stored))
        return value
    entries, treedef = open_pytree(value)
    if entries is None:
        return filling.place(prefix, value)
    children = [_fill(entry, (*prefix, *keys), filling) for keys, entry in entries]
    return jax.tree_util.tree_unflatten(treedef, children)


def _fill_variable(variable: nnx.Variable[Any], path: Path, filling: Filling) -> nnx.Variable[Any]:
    new = _fill(variable.get_raw_value(), path, filling)
    filling.replacements.set_variable(format_leaf_name(filling.item, path), variable, new)
    return variable


def split_item(item: Any) -> tuple[Any, Callable[[Any], Any]]:
    """Split a live nnx object into a value that JAX can map over and the function that merges it back."""
    if isinstance(item, nnx.Pytree):
        graphdef, state = nnx.split(item)
        return state, lambda filled: nnx.merge(graphdef, filled)
    return item, lambda filled: filled


def _require_unique_names(item: str, records: Sequence[Record]) -> None:
    """Refuse paths that Orbax would store under one name.

    Orbax joins keys with dots and, of two equal names, silently stores one: `{"a.b": x, "a": {"b": y}}` came back
    with y twice. TensorStore, to which the name of an array is a directory, adds a slash unless the name ends in one:
    `{"d": x, "d/": y}` are written into each other.

    Raises:
        StructureError: If two leaves share a name.
    """
    names: dict[str, Path] = {}
    directories: dict[str, Path] = {}
    for record in records:
        name = ".".join(map(str, record.path))
        directory = name if name.endswith("/") else f"{name}/"
        other = names.get(name, directories.get(directory) if record.is_in_orbax else None)
        if other is not None:
            raise StructureError(
                what=f"two leaves of {item!r} share the name {name!r}: {other!r} and {record.path!r}.",
                why="Orbax joins keys with dots, adds a slash at the end, and would store only one of the two.",
                fix="rename one of the keys.",
            )
        names[name] = record.path
        if record.is_in_orbax:
            directories[directory] = record.path
