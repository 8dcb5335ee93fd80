# SPDX-License-Identifier: Apache-2.0
"""Proved leaves from the host into a state: leaf by leaf, so that a device never holds more than state and one leaf."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..errors import StructureError
from . import flatten
from .leaves import Path, Record, decode_value, get_host_shape, is_array, is_key, read_inline_array
from .match import Names, is_below, to_names


@dataclasses.dataclass(frozen=True, kw_only=True)
class HostItem:
    """One item as it was read.

    Attributes:
        records: The record for each leaf of the template; leaves without one keep their value.
        restored_records: The records of all leaves that are restored, in their order.
        skeletons: Containers of the stateful objects on disk.
        arrays: Arrays on the host by the path of their record; taken out as they are placed.
    """

    records: dict[Names, Record]
    restored_records: list[Record]
    skeletons: Mapping[Path, Any]
    arrays: dict[Path, np.ndarray[Any, Any]]


def fill_state(state: Mapping[str, Any], items: Mapping[str, HostItem]) -> dict[str, Any]:
    """The whole state with its leaves replaced: live objects in place, all else rebuilt."""
    # Objects that take their state back themselves come first: should one of them refuse, the model is untouched.
    roots = {item: flatten.flatten_item(value, template=True).skeletons for item, value in state.items()}
    ordered = sorted(state, key=lambda item: () not in roots[item])
    filled = {item: _fill_item(state[item], items[item], list(roots[item])) for item in ordered}
    return {item: filled[item] for item in state}


def _fill_item(value: Any, source: HostItem, roots: list[Path], *, copy: bool = False) -> Any:
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
            return _make_global_array(host, sharding)
        # An array that was free to follow others must not come back tied to a device.
        return jax.device_put(host, template.sharding if getattr(template, "committed", True) else None)

    skeletons = {to_names(root): skeleton for root, skeleton in source.skeletons.items()}
    packed = {
        root: (
            skeletons[to_names(root)],
            [_take(source, record) for record in source.restored_records if is_below(record.path, [root])],
        )
        for root in roots
        if to_names(root) in skeletons
    }
    return flatten.fill(value, place, packed)


def _make_global_array(host: Any, sharding: jax.sharding.Sharding) -> jax.Array:
    """A global array of which each process puts its own part in place; all of them hold the same host array."""
    if is_key(host):
        implementation = str(jax.random.key_impl(host))
        data = np.asarray(jax.random.key_data(host))
        return jax.random.wrap_key_data(_make_global_array(data, _get_key_data_sharding(sharding)), impl=implementation)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def _get_key_data_sharding(sharding: jax.sharding.Sharding) -> jax.sharding.Sharding:
    """The sharding of keys for their data, which has a dimension more; a spec leaves that one whole."""
    if isinstance(sharding, jax.sharding.NamedSharding):
        return sharding
    raise StructureError(
        what=f"keys are sharded over several processes by a {type(sharding).__name__}.",
        why="it cannot be told how their data, which has a dimension more, is to be sharded.",
        fix="shard them by a NamedSharding.",
    )


def _take(source: HostItem, record: Record) -> Any:
    """The value of a record, on the host; its array leaves the item, so that it can be freed."""
    if record.kind == "value":
        return decode_value(record.value)
    array = source.arrays.pop(record.path) if record.is_in_orbax else read_inline_array(record)
    if array is None:
        array = np.zeros(*get_host_shape(record))
    if record.kind == "key":
        return jax.random.wrap_key_data(jnp.asarray(array), impl=record.dtype)
    return array[()] if record.scalar == "numpy" else array


def copy_state(state: Mapping[str, Any], items: Mapping[str, HostItem] | None = None) -> dict[str, Any]:
    """A copy that shares nothing with the state, of its own leaves or of those of `items`.

    Objects with `get_state`/`set_state` are left out: they cannot be copied in general.
    """
    copies = {}
    for item, value in state.items():
        if () in flatten.flatten_item(value, template=True).skeletons:
            continue
        functional, back = flatten.split_item(value)
        if items is None:
            copies[item] = back(
                jax.tree.map(lambda leaf: leaf.copy() if isinstance(leaf, jax.Array) else leaf, functional)
            )
        else:
            source = dataclasses.replace(items[item], arrays=dict(items[item].arrays))
            copies[item] = back(_fill_item(functional, source, [], copy=True))
    return copies
