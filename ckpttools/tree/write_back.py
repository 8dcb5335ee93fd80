# SPDX-License-Identifier: Apache-2.0
"""Verified leaves from the host into a state, one by one: a device never holds more than the state and one leaf."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import jax
import numpy as np
from flax import nnx

from ..errors import PlacementError, StructureError
from . import flatten, placing
from .containers import unpack
from .leaf_paths import Names, Path, format_leaf_name, to_names
from .leaves import make_weakly_typed
from .records import Record, decode_value, get_host_shape, read_inline_array
from .replacing import Replacements


@dataclasses.dataclass(frozen=True, kw_only=True)
class HostItem:
    """One item in host memory.

    Attributes:
        records: The record for each leaf of the template; leaves without one are not replaced.
        restored_records: The records of all leaves that are restored, in their order.
        skeletons: The containers of the stored stateful objects, by path.
        arrays: Host arrays by the path of their record; removed as they are placed.
    """

    records: dict[Names, Record]
    restored_records: list[Record]
    skeletons: Mapping[Path, Any]
    arrays: dict[Path, np.ndarray[Any, Any]]


def fill_state(state: Mapping[str, Any], items: Mapping[str, HostItem]) -> dict[str, Any]:
    """Return the state with its leaves replaced: live objects in place, everything else rebuilt.

    Raises:
        StructureError: If one live object has two names with different stored values.
        PlacementError: If a device refuses a leaf. After any exception, including an interrupt, all live objects are
            put back as they were.
    """
    require_one_value_each(state, items)
    # Stateful objects come first: if one of them refuses its state, the model is unchanged.
    ordered = sorted(state, key=lambda item: not flatten.is_stateful_item(state[item]))
    replacements = Replacements()
    # The caller requested the restore, so a transfer guard must not reject its transfers.
    with jax.transfer_guard("allow"):
        try:
            filled = {item: _fill_item(item, state[item], items[item], replacements) for item in ordered}
        except BaseException as error:
            _put_back(replacements, error)
            raise
    return {item: filled[item] for item in state}


def require_one_value_each(state: Mapping[str, Any], items: Mapping[str, HostItem]) -> None:
    """Raise `StructureError` if a live object has two names in the state, and other stored values under each.

    It can hold one of the two, and which one would depend on the order of the items.
    """
    found: dict[int, list[tuple[str, Path, Any]]] = {}
    for item, value in state.items():
        for path, each in _list_live_objects(value, ()):
            found.setdefault(id(each), []).append((item, path, each))
    for same in found.values():
        stored = [(where, _get_stored_values(items[where[0]], where[1], where[2])) for where in same if len(same) > 1]
        stored = [(where, values) for where, values in stored if values]
        for where, values in stored[1:]:
            if not _is_same(stored[0][1], values):
                first, second = (format_leaf_name(*each[:2]) for each in (stored[0][0], where))
                raise StructureError(
                    what=f"{first} and {second} are one object in the state passed in, and two values on disk.",
                    why="the object can hold one of the two, and the other would be lost. Nothing was changed.",
                    fix="build the state with two objects, or leave one of the two items out of the state.",
                )


def _list_live_objects(value: Any, prefix: Path) -> Iterator[tuple[Path, Any]]:
    """Yield the variables and stateful objects that a restore fills in place, under each of their names."""
    if isinstance(value, nnx.Variable) or flatten.is_stateful(value):
        yield prefix, value
    elif isinstance(value, nnx.Pytree):
        for path, entry in nnx.to_flat_state(nnx.state(value)):
            if isinstance(entry, nnx.Variable):
                yield (*prefix, *cast(Path, path)), entry
    elif not isinstance(value, nnx.State):
        for keys, entry in flatten.open_pytree(value)[0] or ():
            yield from _list_live_objects(entry, (*prefix, *keys))


def _get_stored_values(source: HostItem, path: Path, value: Any) -> dict[Any, Any]:
    """Return the records and arrays that an object is filled from, by their paths below it."""
    if flatten.is_stateful(value):
        group = _group_by_root(source.restored_records, source.skeletons).get(to_names(path))
        if group is None:
            return {}
        records = {to_names(record.path)[len(path) :]: record for record in group[1]}
        return {"skeleton": group[0]} | {name: _peek(source, record) for name, record in records.items()}
    below = [to_names(leaf.path) for leaf in flatten.flatten_item(value, template=True).leaves]
    pairs = [(names, source.records.get((*to_names(path), *names))) for names in below]
    return {names: _peek(source, record) for names, record in pairs if record is not None}


def _peek(source: HostItem, record: Record) -> Any:
    """Return what identifies the value of a record: its array, or what the manifest stores."""
    array = source.arrays.get(record.path)
    return (record.kind, record.dtype, record.shape, record.value) if array is None else array


def _is_same(one: dict[Any, Any], other: dict[Any, Any]) -> bool:
    """Whether two objects have equal values; bit for bit, so that NaN equals itself."""
    return one.keys() == other.keys() and all(_is_equal(one[key], other[key]) for key in one)


def _is_equal(one: Any, other: Any) -> bool:
    if not (isinstance(one, np.ndarray) and isinstance(other, np.ndarray)):
        return type(one) is type(other) and bool(one == other)
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    left, right = (np.ascontiguousarray(each).reshape(-1).view(np.uint8) for each in (one, other))
    return one is other or np.array_equal(left, right)


def _put_back(replacements: Replacements, error: BaseException) -> None:
    """Put the live objects back, and name those that could not be put back."""
    on_host, refused = replacements.put_back()
    if refused:
        error.add_note(f"{', '.join(refused)} refused its state from before the restore; everything else is as it was.")
    if on_host:
        raise PlacementError(
            what=f"{', '.join(on_host[:20])} could not be put back after: {str(error).partition(chr(10))[0]:.300}",
            why="the device refuses the old arrays, so these leaves hold their old values as host arrays.",
            fix="save them now, or restart; everything else is as it was before the restore.",
        ) from error


def _fill_item(item: str, value: Any, source: HostItem, replacements: Replacements, *, copy: bool = False) -> Any:
    waiting: list[tuple[str, jax.Array]] = []

    def place(path: Path, template: Any) -> Any:
        record = source.records.get(to_names(path))
        if record is None:
            return _copy_leaf(template) if copy else template
        name = format_leaf_name(item, path)
        host = _take(name, source, record)
        if record.kind == "value" or isinstance(template, np.ndarray | np.generic):
            return _copy_leaf(host) if copy else host
        if record.scalar == "weak":
            host = host.item()
        placed = placing.place(name, host, template)
        # A device may report a failure late. Waiting one leaf behind overlaps its transfer with the next preparation.
        _wait(waiting)
        waiting.append((name, placed))
        replacements.offer_buffer(host, placed)
        return make_weakly_typed(placed) if record.weak_type else placed

    stored_states = _group_by_root(source.restored_records, source.skeletons)

    def get_stored(root: Path) -> tuple[Any, list[Any]] | None:
        # A copy leaves stateful objects out: they cannot be copied in general.
        if copy or to_names(root) not in stored_states:
            return None
        skeleton, records = stored_states[to_names(root)]
        return skeleton, [_take(format_leaf_name(item, record.path), source, record) for record in records]

    filled = flatten.fill(value, flatten.Filling(item, place, get_stored, replacements))
    _wait(waiting)
    return filled


def _wait(waiting: list[tuple[str, jax.Array]]) -> None:
    while waiting:
        name, array = waiting.pop()
        try:
            array.block_until_ready()
        except Exception as error:
            raise placing.make_device_error(name, error) from error


def _group_by_root(records: Sequence[Record], skeletons: Mapping[Path, Any]) -> dict[Names, tuple[Any, list[Record]]]:
    """Return the skeleton of each stateful object and the records of its leaves."""
    grouped: dict[Names, tuple[Any, list[Record]]] = {
        to_names(root): (skeleton, []) for root, skeleton in skeletons.items()
    }
    for record in records if grouped else ():
        names = to_names(record.path)
        for depth in range(len(names) + 1):
            if names[:depth] in grouped:
                grouped[names[:depth]][1].append(record)
    return grouped


def _take(name: str, source: HostItem, record: Record) -> Any:
    """Return the host value of a record; its array is removed from the item, so that it can be freed."""
    if record.kind == "value":
        return decode_value(record.value)
    array = source.arrays.pop(record.path) if record.is_in_orbax else read_inline_array(record)
    if array is None:
        array = np.zeros(*get_host_shape(record))
    if record.kind == "key":
        try:
            return jax.random.wrap_key_data(jax.device_put(array), impl=record.dtype)
        except Exception as error:
            raise placing.make_device_error(name, error) from error
    return array[()] if record.scalar == "numpy" else array


def _copy_leaf(value: Any) -> Any:
    """Return a copy of a value that could be changed in place, or given away to a jitted function."""
    if isinstance(value, jax.Array):
        # `jax_debug_nans` is meant for what computes a NaN, not for a copy of one.
        with jax.debug_nans(False), jax.debug_infs(False):
            return value.copy()
    return value.copy() if isinstance(value, np.ndarray | bytearray) else value


def copy_state(state: Mapping[str, Any], items: Mapping[str, HostItem] | None = None) -> dict[str, Any]:
    """Return a copy that shares nothing with the state.

    Items that are stateful objects are omitted: they cannot be copied in general.

    Args:
        state: Items by name.
        items: Leaves for the copy, which stay in `items`; by default those of the state.

    Raises:
        StructureError: If one live object stands under two names that have different stored values.
    """
    if items is not None:
        require_one_value_each(state, items)
    copies = {}
    with jax.transfer_guard("allow"):
        for item, value in state.items():
            if flatten.is_stateful_item(value):
                continue
            functional, merge = flatten.split_item(value)
            if items is None:
                copies[item] = merge(jax.tree.map(_copy_leaf, functional))
            else:
                source = dataclasses.replace(items[item], arrays=dict(items[item].arrays))
                # Live objects inside a container are filled in place, so the copy gets new objects.
                structure = jax.tree.map(lambda leaf: leaf, functional)
                copies[item] = merge(_fill_item(item, structure, source, Replacements(), copy=True))
    return copies


def require_legal_skeletons(
    template: flatten.FlatItem, records: Sequence[Record], skeletons: Mapping[Path, Any]
) -> None:
    """Rebuild the stored containers of stateful objects once, so that it cannot fail in the middle of a restore.

    Raises:
        CorruptStepError: If they cannot be rebuilt.
    """
    roots = {to_names(root) for root in template.skeletons}
    for root, (skeleton, owned) in _group_by_root(records, skeletons).items():
        if root in roots:
            unpack(skeleton, [None] * len(owned))
