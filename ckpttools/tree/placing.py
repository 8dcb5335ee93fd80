# SPDX-License-Identifier: Apache-2.0
"""Place one leaf on its devices, and find everything that would prevent that before any live leaf changes.

The check uses only the template, the record and the devices, so it is cheap and done before arrays are read. A device
may still refuse a leaf later, for example because another program takes its memory: then `replacing` puts the state
back.
"""

import collections
import gc
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, NamedSharding, Sharding

from ..errors import PlacementError, StructureError
from .leaves import is_array, is_key
from .records import Record, get_host_shape

type TargetLeaf = tuple[str, Any, Record]
"""Name of a leaf of the state, its value there, and the record of the array that replaces it."""

_MAX_LINES = 20


def require_placeable(leaves: Iterable[TargetLeaf]) -> None:
    """Raise `PlacementError`, naming every leaf, unless all leaves can be placed where their templates are.

    Args:
        leaves: All leaves that will be placed, in that order.
    """
    on_device = [leaf for leaf in leaves if leaf[2].kind != "value" and not _is_on_host(leaf[1])]
    problems = {name: text for name, template, record in on_device if (text := _find_problem(template, record))}
    if problems:
        shown = [f"\n    {name}: {text}" for name, text in list(problems.items())[:_MAX_LINES]]
        more = f"\n    ... and {len(problems) - _MAX_LINES} more" if len(problems) > _MAX_LINES else ""
        error = PlacementError(
            what=f"{len(problems)} leaf(s) cannot be placed where the state passed in has them:{''.join(shown)}{more}",
            why="the restore would stop halfway, with a state that is neither the old nor the new one.",
            fix="fix the leaves listed above and restore again; nothing was changed.",
        )
        error.leaves = tuple(problems)
        raise error
    shortage = _find_shortage(on_device)
    if shortage and gc.collect():
        # Free arrays in reference cycles before a restore is refused because of them.
        shortage = _find_shortage(on_device)
    if shortage:
        raise PlacementError(
            what=f"the state does not fit into device memory: {shortage}.",
            why="the restore would run out of memory halfway.",
            fix="free unused arrays, or shard the state over more devices; nothing was changed.",
        )


def _is_on_host(template: Any) -> bool:
    return isinstance(template, np.ndarray | np.generic)


def _find_problem(template: Any, record: Record) -> str:
    """Return why a leaf cannot be placed; "" if no reason is known."""
    dtype = get_host_shape(record)[1]
    if record.kind != "key" and jax.dtypes.canonicalize_dtype(dtype) != dtype:
        return f'{record.dtype} needs jax.config.update("jax_enable_x64", True); JAX would truncate it silently'
    try:
        sharding = get_sharding(template)
        if sharding is None:
            return ""
        sharding.shard_shape(record.shape)
        if record.kind == "key" and not sharding.is_fully_addressable:
            _get_key_data_sharding(sharding)
    except ValueError as error:
        return getattr(error, "what", None) or str(error).partition("\n")[0]
    return _find_missing_memory_kind(sharding)


def _find_missing_memory_kind(sharding: Sharding) -> str:
    device: Any
    for device in sharding.addressable_devices:
        kinds = [memory.kind for memory in device.addressable_memories()]
        if sharding.memory_kind is not None and sharding.memory_kind not in kinds:
            return f"{device} has no memory of the kind {sharding.memory_kind!r}, only {', '.join(map(repr, kinds))}"
    return ""


def _find_shortage(leaves: Iterable[TargetLeaf]) -> str:
    """Return which device lacks how much memory; "" if none is known to.

    Counts the minimum that the restore needs: each old array counts as freed once it is replaced, although the caller
    may still reference it. So no restore that could succeed is refused.
    """
    held: collections.Counter[jax.Device] = collections.Counter()
    peak: collections.Counter[jax.Device] = collections.Counter()
    for _, template, record in leaves:
        for device, size in _measure_target(template, record):
            held[device] += size
            peak[device] = max(peak[device], held[device])
        if isinstance(template, jax.Array) and not is_key(template) and not template.is_deleted():
            for device, size in _measure_shards(template.sharding, template.shape, template.dtype.itemsize):
                held[device] -= size
    for device, needed in peak.items():
        stats = device.memory_stats() or {}
        if "bytes_limit" in stats and needed > (free := stats["bytes_limit"] - stats.get("bytes_in_use", 0)):
            return f"{device} has {free / 2**20:.1f} MiB free and needs at least {needed / 2**20:.1f} MiB more"
    return ""


def _measure_target(template: Any, record: Record) -> Iterator[tuple[jax.Device, int]]:
    sharding = get_sharding(template)
    if sharding is not None and record.kind == "array":
        yield from _measure_shards(sharding, record.shape, get_host_shape(record)[1].itemsize)


def _measure_shards(sharding: Sharding, shape: tuple[int, ...], itemsize: int) -> Iterator[tuple[jax.Device, int]]:
    """Yield the bytes of an array on each device of this process; nothing for an array in host memory."""
    if sharding.memory_kind in ("pinned_host", "unpinned_host"):
        return
    size = int(np.prod(sharding.shard_shape(shape), dtype=np.int64)) * itemsize
    for device in sharding.addressable_devices:
        yield device, size


def get_sharding(template: Any) -> Sharding | None:
    """Return where a leaf is placed: the template's sharding, on the current mesh if the template's is abstract.

    Args:
        template: The leaf of the state.

    Raises:
        ValueError: If the template's mesh is abstract and the current mesh does not have the axes.
    """
    sharding = getattr(template, "sharding", None)
    if not isinstance(sharding, NamedSharding) or not isinstance(sharding.mesh, AbstractMesh):
        return sharding
    if sharding.mesh.empty:
        return None
    mesh = jax.sharding.get_mesh()
    if mesh.empty:
        axes = dict(sharding.mesh.shape)
        raise ValueError(f"its mesh {axes} is abstract and no mesh is current; restore `with jax.set_mesh(mesh):`")
    return NamedSharding(mesh, sharding.spec, memory_kind=sharding.memory_kind)


def place(name: str, host: Any, template: Any) -> jax.Array:
    """Return a leaf on the devices of the template.

    Args:
        name: Name of the leaf, for errors.
        host: The verified value: an array, a typed key or a number.
        template: The leaf of the state.

    Raises:
        PlacementError: If a device refuses it.
    """
    placed: jax.Array
    try:
        if not is_array(template):
            placed = jax.device_put(host)
            return placed
        sharding = get_sharding(template)
        if sharding is not None and not sharding.is_fully_addressable:
            return _make_global_array(host, sharding)
        # An uncommitted array must stay uncommitted.
        placed = jax.device_put(host, sharding if getattr(template, "committed", True) else None)
        return placed
    except StructureError:
        raise
    except Exception as error:
        raise make_device_error(name, error) from error


def make_device_error(name: str, error: Exception) -> PlacementError:
    """Return the error for a leaf that a device refused although all checks had passed."""
    reason = str(error).partition("\n")[0]
    failure = PlacementError(
        what=f"{name} could not be placed on its devices: {type(error).__name__}: {reason:.300}",
        why="a partly restored state is neither the old nor the new one, so all of it was put back as it was.",
        fix="free device memory, or shard the state over more devices, and restore again.",
    )
    failure.leaves = (name,)
    return failure


def _make_global_array(host: Any, sharding: Sharding) -> jax.Array:
    """Return a global array; each process places its own shards from the same host array."""
    if is_key(host):
        implementation = str(jax.random.key_impl(host))
        data = np.asarray(jax.random.key_data(host))
        return jax.random.wrap_key_data(_make_global_array(data, _get_key_data_sharding(sharding)), impl=implementation)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def _get_key_data_sharding(sharding: Sharding) -> Sharding:
    """Return the sharding of keys for their data; the extra dimension is not sharded, since the spec omits it."""
    if isinstance(sharding, NamedSharding):
        return sharding
    raise StructureError(
        what=f"keys are sharded across processes by a {type(sharding).__name__}.",
        why="it does not define how to shard the data of the keys, which has one more dimension.",
        fix="shard them with a NamedSharding.",
    )
