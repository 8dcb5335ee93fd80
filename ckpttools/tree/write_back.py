# SPDX-License-Identifier: Apache-2.0
"""Verified leaves from the host into a state, one by one: a device never holds more than the state and one leaf."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..errors import StructureError
from . import flatten
from .containers import unpack
from .leaf_paths import Names, Path, is_below, to_names
from .leaves import is_array, is_key, weaken
from .records import Record, decode_value, get_host_shape, read_inline_array


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
    """Return the state with its leaves replaced: live objects in place, everything else rebuilt."""
    # Stateful objects come first: if one of them refuses its state, the model is unchanged.
    ordered = sorted(state, key=lambda item: not flatten.is_stateful_item(state[item]))
    filled = {item: _fill_item(state[item], items[item]) for item in ordered}
    return {item: filled[item] for item in state}


def _fill_item(value: Any, source: HostItem, *, copy: bool = False) -> Any:
    def place(path: Path, template: Any) -> Any:
        record = source.records.get(to_names(path))
        if record is None:
            return template.copy() if copy and isinstance(template, jax.Array) else template
        host = _take(source, record)
        if record.kind == "value" or isinstance(template, np.ndarray | np.generic):
            return host
        if record.scalar == "weak":
            host = host.item()
        if not is_array(template):
            return jnp.asarray(host)
        sharding = getattr(template, "sharding", None)
        if sharding is not None and not sharding.is_fully_addressable:
            placed = _make_global_array(host, sharding)
        else:
            # An uncommitted array must not come back committed to a device.
            placed = jax.device_put(host, template.sharding if getattr(template, "committed", True) else None)
        return weaken(placed) if record.weak_type else placed

    skeletons = {to_names(root): skeleton for root, skeleton in source.skeletons.items()}

    def get_stored(root: Path) -> tuple[Any, list[Any]] | None:
        # A copy leaves stateful objects out: they cannot be copied in general.
        if copy or to_names(root) not in skeletons:
            return None
        values = [_take(source, record) for record in source.restored_records if is_below(record.path, [root])]
        return skeletons[to_names(root)], values

    return flatten.fill(value, place, get_stored)


def _make_global_array(host: Any, sharding: jax.sharding.Sharding) -> jax.Array:
    """Return a global array of which each process places its own shards; all of them hold the same host array."""
    if is_key(host):
        implementation = str(jax.random.key_impl(host))
        data = np.asarray(jax.random.key_data(host))
        return jax.random.wrap_key_data(_make_global_array(data, _get_key_data_sharding(sharding)), impl=implementation)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def _get_key_data_sharding(sharding: jax.sharding.Sharding) -> jax.sharding.Sharding:
    """Return the sharding of keys for their data; its extra dimension is not sharded, since the spec omits it."""
    if isinstance(sharding, jax.sharding.NamedSharding):
        return sharding
    raise StructureError(
        what=f"keys are sharded across processes by a {type(sharding).__name__}.",
        why="it does not say how to shard the data of the keys, which has one dimension more.",
        fix="shard them by a NamedSharding.",
    )


def _take(source: HostItem, record: Record) -> Any:
    """Return the host value of a record; its array is removed from the item, so that it can be freed."""
    if record.kind == "value":
        return decode_value(record.value)
    array = source.arrays.pop(record.path) if record.is_in_orbax else read_inline_array(record)
    if array is None:
        array = np.zeros(*get_host_shape(record))
    if record.kind == "key":
        return jax.random.wrap_key_data(jnp.asarray(array), impl=record.dtype)
    return array[()] if record.scalar == "numpy" else array


def copy_state(state: Mapping[str, Any], items: Mapping[str, HostItem] | None = None) -> dict[str, Any]:
    """Return a copy that shares nothing with the state.

    Items that are stateful objects are left out: they cannot be copied in general.

    Args:
        state: Items by name.
        items: Leaves for the copy, which stay in `items`; by default those of the state.
    """
    copies = {}
    for item, value in state.items():
        if flatten.is_stateful_item(value):
            continue
        functional, merge = flatten.split_item(value)
        if items is None:
            copies[item] = merge(
                jax.tree.map(lambda leaf: leaf.copy() if isinstance(leaf, jax.Array) else leaf, functional)
            )
        else:
            source = dataclasses.replace(items[item], arrays=dict(items[item].arrays))
            copies[item] = merge(_fill_item(functional, source, copy=True))
    return copies


def require_legal_skeletons(
    template: flatten.FlatItem, records: Sequence[Record], skeletons: Mapping[Path, Any]
) -> None:
    """Rebuild the stored containers of stateful objects once, so that it cannot fail in the middle of a restore.

    Raises:
        CorruptStepError: If they cannot be rebuilt.
    """
    roots = {to_names(root) for root in template.skeletons}
    for root, skeleton in skeletons.items():
        if to_names(root) in roots:
            unpack(skeleton, [None for record in records if is_below(record.path, [root])])
