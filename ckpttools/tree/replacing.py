# SPDX-License-Identifier: Apache-2.0
"""Replace values of live objects one by one, and put all of them back if the restore does not complete.

Keeping the old arrays on their devices would double the device memory of a restore, so each is copied to the host. The
copy replaces the restored leaf, which has just left the host, so host memory does not grow either. Small arrays are
kept as they are, up to `_REFERENCED_BYTES` in all.
"""

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Mapping, MutableMapping, MutableSequence, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from .leaf_paths import Path
from .leaves import is_key

_SMALL_BYTES = 64 << 10
_REFERENCED_BYTES = 4 << 20


@dataclasses.dataclass(frozen=True)
class _HostCopy:
    """An old array on the host: what its shards held, and where they were."""

    array: jax.ShapeDtypeStruct
    committed: bool
    shards: tuple[tuple[jax.Device, np.ndarray[Any, Any]], ...]

    def place(self) -> jax.Array:
        """Return the array as it was."""
        sharding = self.array.sharding
        assert sharding is not None
        if not self.committed and len(self.shards) == 1:
            with jax.default_device(self.shards[0][0]):
                alone: jax.Array = jax.device_put(self.shards[0][1])
            return alone
        placed = [
            jax.device_put(data, jax.sharding.SingleDeviceSharding(device, memory_kind=sharding.memory_kind))
            for device, data in self.shards
        ]
        return jax.make_array_from_single_device_arrays(self.array.shape, sharding, placed)

    def get_host_value(self) -> Any:
        """Return the values as a host array, for a device that refuses even its old values."""
        whole = np.empty(self.array.shape, self.array.dtype)
        assert self.array.sharding is not None
        indices = self.array.sharding.addressable_devices_indices_map(self.array.shape)
        for device, data in self.shards:
            whole[indices[device]] = data
        return whole


@dataclasses.dataclass(frozen=True)
class _Remembered:
    """An old pytree with arrays that are on the host."""

    treedef: Any
    leaves: tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class _Replaced:
    """One value that was replaced."""

    name: str
    old: Any
    write: Callable[[Any], None]
    free: Callable[[], None] = lambda: None


class Replacements:
    """Replaces values of live objects and remembers the old ones; used by one restore, in one thread."""

    def __init__(self) -> None:
        self._replaced: list[_Replaced] = []
        self._variables: set[int] = set()
        self._referenced_bytes = 0
        self._spare: np.ndarray[Any, Any] | None = None

    def offer_buffer(self, host: Any, placed: jax.Array) -> None:
        """Offer the host memory of a placed leaf, so that the old value can be copied into it.

        On CPU the copy then takes a third of the time, because new memory has to be mapped page by page.
        """
        self._spare = None
        if isinstance(host, np.ndarray) and host.nbytes > _SMALL_BYTES and host.flags.writeable and _is_on_cpu(placed):
            placed.block_until_ready()
            # JAX may use the memory of a host array instead of copying it.
            if np.asarray(placed).ctypes.data != host.ctypes.data:
                self._spare = host

    def set_variable(self, name: str, variable: nnx.Variable[Any], value: Any) -> None:
        """Set the value of a variable."""
        # A variable that two items share is replaced twice; the value before the first replacement is the old one.
        if id(variable) not in self._variables:
            old = self._remember(variable.get_raw_value())
            # Freed first, so that the device never holds more than the state and one leaf.
            entry = _Replaced(name, old, variable.set_raw_value, lambda: variable.set_raw_value(None))
            self._replaced.append(entry)
            self._variables.add(id(variable))
        variable.set_raw_value(value)

    def set_entry(self, name: str, root: nnx.Pytree, path: Path, value: Any) -> None:
        """Set an array that is an attribute or entry inside an nnx object, outside a variable."""
        write = _find_setter(root, path)
        self._replaced.append(_Replaced(name, self._remember(_get_entry(root, path)), write))
        write(value)

    def set_state(self, name: str, value: Any, state: Any) -> None:
        """Set the state of an object with `get_state` and `set_state`."""
        # An object without a state yet cannot return one; it is then not put back.
        with contextlib.suppress(Exception):
            old = copy.deepcopy(value.get_state())
            self._replaced.append(_Replaced(name, old, value.set_state))
        value.set_state(state)

    def put_back(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Put all values back, the last one first.

        An interrupt meanwhile does not stop it, and is raised at the end.

        Returns:
            Names of the leaves that no device accepts, which hold their old values as host arrays; names of the objects
            that refuse their old state.
        """
        interrupt: BaseException | None = None
        on_host: list[str] = []
        refused: list[str] = []
        failures = 0
        while self._replaced:
            # A value stays in the list until it is back: after an interrupt it is written again.
            try:
                if not _put_back(self._replaced[-1]):
                    on_host.append(self._replaced[-1].name)
            except Exception:
                # The first one may have been raised by the handler of a signal.
                failures += 1
                if failures == 1:
                    continue
                refused.append(self._replaced[-1].name)
            except BaseException as error:
                interrupt = error
                continue
            failures = 0
            self._replaced.pop()
        if interrupt is not None:
            raise interrupt
        return tuple(on_host), tuple(refused)

    def _remember(self, value: Any) -> Any:
        """Return what is needed to rebuild a value, in a form that uses little device memory."""
        if isinstance(value, jax.Array):
            return self._remember_array(value)
        leaves, treedef = jax.tree.flatten(value, is_leaf=_is_live)
        remembered = [self._remember_array(leaf) if isinstance(leaf, jax.Array) else leaf for leaf in leaves]
        if not any(isinstance(leaf, _HostCopy) for leaf in remembered):
            return value
        return _Remembered(treedef, tuple(remembered))

    def _remember_array(self, array: jax.Array) -> Any:
        # Weakly typed arrays and typed keys cannot be rebuilt from host arrays, but they are small; a deleted array
        # uses no memory and has to stay deleted.
        if is_key(array) or array.weak_type or array.is_deleted() or _needs_x64(array):
            return array
        if array.nbytes <= _SMALL_BYTES and self._referenced_bytes + array.nbytes <= _REFERENCED_BYTES:
            self._referenced_bytes += array.nbytes
            return array
        try:
            spare, self._spare = self._spare, None
            return _copy_to_host(array, spare)
        except Exception:
            # The array is the result of a failed computation and has no values.
            return array


def _needs_x64(array: jax.Array) -> bool:
    return bool(jax.dtypes.canonicalize_dtype(array.dtype) != array.dtype)


def _is_on_cpu(array: jax.Array) -> bool:
    return len(array.devices()) == 1 and next(iter(array.devices())).platform == "cpu"


def _copy_to_host(array: jax.Array, spare: np.ndarray[Any, Any] | None) -> _HostCopy:
    """Return a copy of an array; into `spare` if it is as large as the whole array."""
    copies: dict[tuple[Any, ...], np.ndarray[Any, Any]] = {}
    shards = []
    for shard in array.addressable_shards:
        place = tuple((part.start, part.stop) for part in shard.index)
        if place not in copies:
            copies[place] = _copy_shard(shard.data, spare)
        shards.append((shard.device, copies[place]))
    form = jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding)
    return _HostCopy(form, array.committed, tuple(shards))


def _copy_shard(data: jax.Array, spare: np.ndarray[Any, Any] | None) -> np.ndarray[Any, Any]:
    view = np.asarray(data)
    if not _is_on_cpu(data):
        return view
    # On CPU the view shares the array's memory, and would keep it alive.
    fits = spare is not None and (spare.shape, spare.dtype) == (view.shape, view.dtype)
    target = spare if spare is not None and fits else np.empty_like(view)
    np.copyto(target, view)
    return target


def _is_live(value: Any) -> bool:
    """Whether a value is an object that is filled in place, so that it is its own old value."""
    return isinstance(value, nnx.Pytree | nnx.State | nnx.Variable)


def _put_back(replaced: _Replaced) -> bool:
    """Put one value back; return whether a device took it."""
    replaced.free()
    try:
        value = _make(replaced.old, _HostCopy.place)
    except Exception:
        replaced.write(_make(replaced.old, _HostCopy.get_host_value))
        return False
    replaced.write(value)
    return True


def _make(old: Any, make: Callable[[_HostCopy], Any]) -> Any:
    """Return an old value, with its arrays rebuilt by `make`."""
    if isinstance(old, _Remembered):
        return jax.tree.unflatten(old.treedef, [_make(leaf, make) for leaf in old.leaves])
    return make(old) if isinstance(old, _HostCopy) else old


def _get_child(node: Any, key: str | int) -> Any:
    if isinstance(node, nnx.Pytree):
        return vars(node)[str(key)]
    if isinstance(node, Mapping):
        return node[key]
    if isinstance(node, Sequence) and isinstance(key, int):
        return node[key]
    return getattr(node, str(key))


def _get_entry(root: Any, path: Path) -> Any:
    for key in path:
        root = _get_child(root, key)
    return root


def _find_setter(root: nnx.Pytree, path: Path) -> Callable[[Any], None]:
    """Return a function that sets the value at a path; immutable containers above it are rebuilt."""
    nodes = [root]
    for key in path[:-1]:
        nodes.append(_get_child(nodes[-1], key))
    depth = max(at for at, node in enumerate(nodes) if isinstance(node, nnx.Pytree | MutableMapping | MutableSequence))
    owner, key, rest = nodes[depth], path[depth], path[depth + 1 :]

    def write(value: Any) -> None:
        value = _rebuild(_get_child(owner, key), rest, value) if rest else value
        if isinstance(owner, nnx.Pytree):
            setattr(owner, str(key), value)
        else:
            owner[key] = value

    return write


def _rebuild(node: Any, path: Path, value: Any) -> Any:
    """Return an immutable container, such as a tuple, with one entry replaced."""
    entries, treedef = jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda part: part is not node)
    key = str(path[0])
    children = [
        (_rebuild(child, path[1:], value) if path[1:] else value)
        if str(jax.tree_util.keystr(keys, simple=True)) == key
        else child
        for keys, child in entries
    ]
    return jax.tree_util.tree_unflatten(treedef, children)
