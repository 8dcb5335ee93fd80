# SPDX-License-Identifier: Apache-2.0
"""Array I/O through Orbax: the only file that imports it.

Orbax v1's free functions write host arrays into a staging directory and read them back; no manager is involved. Facts:

-   a v1 `Context` is per thread, so it is entered around each call;
-   `deepcopy_host_arrays` is switched off: the arrays passed in are ours and do not change until the call returns;
-   Orbax refuses empty trees and numpy scalars, and of two names that are equal after joining keys with dots it
    silently keeps one (`tree.flatten.require_unique_names` guards against that);
-   with several processes, v1's functions run a collective that has no time limit and must not run beside training;
    v0's handler of pytrees, which they call, has no barrier, so it writes the shards.
"""

import contextlib
import dataclasses
import gc
import logging
import pathlib
import sys
import threading
import types
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from orbax import checkpoint as v0
from orbax.checkpoint import v1 as ocp
from orbax.checkpoint._src.multihost import multihost

from ..errors import StorageError
from ..threads import run_outside_main_thread
from ..tree.leaf_paths import Path
from ..tree.records import Record, get_host_shape
from ..tree.snapshot import Snapshot
from .formats import foreign_layouts
from .formats.orbax_trees import build_trees, get_leaf, has_sequences, match_stored_containers, put_leaf

_PACKAGE = str(pathlib.Path(str(v0.__file__)).parent)

_saving = threading.Lock()
"""Orbax counts its saves in the whole process, and two at once use each other's temporary directories. Never held by
the main thread, which an exception of a signal handler could keep from releasing it.
"""

_DATA_FILE_BYTES = 128 << 20
"""Orbax's default is 2 GB. Smaller files are written in parallel (524 MB on 2 cores: 0.26 s instead of 0.42), and an
interrupted copy to a mirror has less to repeat."""

type HostArrays = dict[str, dict[Path, np.ndarray[Any, Any]]]
"""Arrays on the host by item and path; key data for typed keys."""


def write(directory: pathlib.Path, snapshot: Snapshot, *, compression: bool) -> None:
    """Write an Orbax checkpoint to `directory`, which must not exist yet.

    Args:
        directory: Absolute path.
        snapshot: All leaves; those that the manifest stores are skipped.
        compression: Whether to compress with zstd.
    """
    with _allow_transfers():
        items = build_trees(snapshot, lambda leaf: leaf.array)
    if not items:
        directory.mkdir(parents=True)
        return
    run_outside_main_thread(lambda: _write_trees(directory, items, compression))
    _require_index(directory, items)


def _write_trees(directory: pathlib.Path, items: dict[str, Any], compression: bool) -> None:
    context = ocp.Context()
    context.array.saving.use_compression = compression
    context.array.saving.ocdbt_target_data_file_size = _DATA_FILE_BYTES
    context.memory.deepcopy_host_arrays = False
    with _saving, context, _allow_transfers():
        ocp.save_checkpointables(directory, items)


def _require_index(directory: pathlib.Path, items: Iterable[str]) -> None:
    """Raise `StorageError` if an item has no index of its arrays.

    Orbax looks for what it has to merge with `Path.glob`, which treats a directory that cannot be listed (a bad disk,
    too many open files) as empty: it merged nothing, raised nothing, and the step was unreadable.
    """
    lacking = [item for item in items if not (directory / item / "manifest.ocdbt").is_file()]
    if lacking:
        raise StorageError(
            what=f"Orbax left {', '.join(lacking)} of {directory.name} without the index of its arrays.",
            why="it could not list what it had just written; without the index the step cannot be read.",
            fix="check the disk and the limit of open files (ulimit -n); the next save tries again.",
        )


def write_shards(directory: pathlib.Path, snapshot: Snapshot, *, is_leader: bool, compression: bool) -> None:
    """Write the shards that this process holds; waits for no other process.

    Args:
        directory: Absolute path; it has a directory for each item.
        snapshot: All leaves.
        is_leader: Whether this process also writes the arrays that each process holds all of; only one may.
        compression: Whether to compress with zstd.
    """
    with _allow_transfers():
        trees = build_trees(snapshot, lambda leaf: leaf.array if is_leader else leaf.sharded_array)
        for item, tree in trees.items():
            args = v0.args.PyTreeSave(tree, ocdbt_target_data_file_size=_DATA_FILE_BYTES)
            with _saving:
                _make_shard_handler(compression).save(_to_orbax_path(directory / item), args=args)


def _allow_transfers() -> contextlib.AbstractContextManager[Any]:
    """Lift `jax_transfer_guard`: the caller requested these transfers."""
    guard: contextlib.AbstractContextManager[Any] = jax.transfer_guard("allow")
    return guard


def finalize_shards(directory: pathlib.Path, items: Sequence[str]) -> None:
    """Merge the shards that all processes have written into one checkpoint; called by process 0."""
    for item in items:
        _make_shard_handler(compression=False).finalize(_to_orbax_path(directory / item))
    _require_index(directory, items)
    kind = ocp.handlers.PyTreeHandler
    handlers = dict.fromkeys(items, f"{kind.__module__}.{kind.__qualname__}")
    store = v0.metadata.metadata_store(enable_write=True, blocking_write=True)
    store.write(_to_orbax_path(directory / "_CHECKPOINT_METADATA"), {"item_handlers": handlers})


def _make_shard_handler(compression: bool) -> Any:
    return v0.PyTreeCheckpointHandler(use_ocdbt=True, use_zarr3=True, use_compression=compression)


def _to_orbax_path(path: pathlib.Path) -> Any:
    return ocp.Context().file_options.path_class(path)


def get_coordination_store() -> Any:
    """Return the key-value store of `jax.distributed`; JAX has no public name for it."""
    return multihost.get_jax_distributed_client()


def read(directory: pathlib.Path, records: Mapping[str, tuple[Record, ...]]) -> HostArrays:
    """Read the given leaves, and nothing else, to the host.

    Raises:
        ReadError: If Orbax could not read them; the caller finds the damage by digests.
    """
    items: dict[str, Any] = {}
    for item, leaves in records.items():
        tree: dict[str, Any] = {}
        for record in leaves:
            # Also for keys, whose data Orbax reads as a host array: no device is needed.
            if record.is_in_orbax:
                put_leaf(tree, record.path, np.empty(*get_host_shape(record)))
        if tree:
            items[item] = tree
    if not items:
        return {item: {} for item in records}
    try:
        loaded = _load(_make_read_context(is_partial=True), directory, items)
    except ReadError:
        # We write dicts only. An adopted step may hold lists and tuples, which Orbax does not treat as dicts.
        if not has_sequences(directory, items) or not (shaped := _match_stored_containers(directory, items)):
            raise
        loaded = _load(_make_read_context(is_partial=True), directory, shaped)
    return {
        item: {each.path: _to_host(each, get_leaf(loaded[item], each.path)) for each in leaves if each.is_in_orbax}
        for item, leaves in records.items()
    }


def _match_stored_containers(directory: pathlib.Path, items: Mapping[str, Any]) -> dict[str, Any]:
    try:
        described = _read_metadata(directory)
    except ReadError:
        return {}
    return match_stored_containers(described, items)


def read_foreign(directory: pathlib.Path) -> dict[str, Any]:
    """Read all items of a step that plain Orbax wrote, as its metadata describes them.

    Raises:
        ReadError: If Orbax cannot read it as named items.
    """
    with warnings.catch_warnings():
        # Without a template Orbax warns that it takes the sharding from the file, which is intended here.
        warnings.filterwarnings("ignore", message="Sharding info not provided")
        return _load(
            _make_read_context(), directory, {name: None for name in _read_metadata(directory) if name != "metrics"}
        )


def describe_foreign(directory: pathlib.Path) -> list[tuple[str, tuple[int, ...], str]]:
    """Return name, shape and dtype of each leaf of a step that plain Orbax wrote; reads metadata only.

    The dtype is "" for a leaf that is not an array: Orbax's metadata does not hold its value.

    Raises:
        ReadError: If Orbax cannot read it.
    """
    found = []
    for item, tree in _read_metadata(directory).items():
        for keys, leaf in jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda node: hasattr(node, "shape"))[0]:
            name = ".".join([item, *(str(getattr(key, "key", getattr(key, "idx", key))) for key in keys)])
            is_array = hasattr(leaf, "shape") and hasattr(leaf, "dtype")
            found.append((name, tuple(leaf.shape), np.dtype(leaf.dtype).name) if is_array else (name, (), ""))
    if not found:
        raise ReadError(ValueError("it names no items"))
    return found


class ReadError(Exception):
    """Whatever Orbax or TensorStore raised while reading, as a string.

    The original is dropped on purpose: a load that fails leaves coroutines that nobody awaits, held by the frames of
    the exception, and they would warn at some later point of the user's program.
    """

    def __init__(self, error: Exception) -> None:
        super().__init__(f"{type(error).__name__}: {error}")
        self.errno: int | None = getattr(error, "errno", None)


def _read_metadata(directory: pathlib.Path) -> Mapping[str, Any]:
    """Return Orbax's metadata of each item."""
    if foreign_layouts.is_bare(directory):
        return _call_orbax(_make_read_context(), lambda: {foreign_layouts.BARE_ITEM: ocp.metadata(directory).metadata})
    return _call_orbax(_make_read_context(), lambda: dict(ocp.checkpointables_metadata(directory).metadata))


def _make_read_context(*, is_partial: bool = False) -> ocp.Context:
    """Return a context in which this process reads alone, without waiting for others, and possibly only some leaves."""
    context = ocp.Context()
    context.pytree.loading.partial_load = is_partial
    if jax.process_count() > 1:
        here = ocp.multihost.process_index()
        context.multiprocessing.primary_host, context.multiprocessing.active_processes = here, {here}
    return context


def _load(context: ocp.Context, directory: pathlib.Path, items: Mapping[str, Any]) -> dict[str, Any]:
    """Load item by item: in one call for several, the failure of one drops the coroutines of the others unawaited."""

    def load() -> dict[str, Any]:
        loaded: dict[str, Any] = {}
        for name, tree in items.items():
            if foreign_layouts.is_bare(directory):
                loaded[name] = ocp.load(directory) if tree is None else ocp.load(directory, tree)
            else:
                loaded.update(ocp.load_checkpointables(directory, {name: tree}))
        return loaded

    return _call_orbax(context, load)


def _call_orbax[T](context: ocp.Context, read: Callable[[], T]) -> T:
    """Return what `read` returns; raise its failure once, as a `ReadError`, and silence what it leaves behind."""

    def call() -> T:
        failure = None
        with context, _mute_leftovers(), _allow_transfers():
            try:
                return read()
            except Exception as error:
                failure = ReadError(error)
            gc.collect()
        raise failure

    return run_outside_main_thread(call)


@contextlib.contextmanager
def _mute_leftovers() -> Iterator[None]:
    """Silence the warnings about what a failed load leaves: coroutines that nobody awaits and a closed loop.

    We report the failure itself. A coroutine of Orbax's may also raise while it is collected, because its loop is
    closed or because it treats that as a failed read, and nobody can catch that: it reaches `sys.unraisablehook`.
    Everything else is passed on.
    """
    logger, hook = logging.getLogger("asyncio"), sys.unraisablehook

    def handle_unraisable(event: Any) -> None:
        lost_loop = isinstance(event.exc_value, RuntimeError) and "loop is closed" in str(event.exc_value)
        of_orbax = isinstance(event.object, types.CoroutineType) and _PACKAGE in event.object.cr_code.co_filename
        if not (lost_loop or of_orbax):
            hook(event)

    disabled, logger.disabled = logger.disabled, True
    sys.unraisablehook = handle_unraisable
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="coroutine .* was never awaited", category=RuntimeWarning)
            warnings.filterwarnings("ignore", message="unclosed event loop", category=ResourceWarning)
            yield
    finally:
        logger.disabled, sys.unraisablehook = disabled, hook


def _to_host(record: Record, loaded: Any) -> np.ndarray[Any, Any]:
    if isinstance(loaded, jax.ShapeDtypeStruct):  # requested by a name that the step's metadata does not have
        raise ReadError(KeyError(f"Orbax did not find {'.'.join(map(str, record.path))}"))
    return np.asarray(jax.random.key_data(loaded) if isinstance(loaded, jax.Array) and record.kind == "key" else loaded)


policies = v0.checkpoint_managers
"""Orbax's policies of when to save and what to keep."""


def make_manager_options(**fields: Any) -> Any:
    """Return Orbax's `CheckpointManagerOptions`; `timeout_s` replaces its options for background saves."""
    timeout_s = fields.pop("timeout_s")
    return v0.CheckpointManagerOptions(async_options=v0.AsyncOptions(timeout_secs=timeout_s), **fields)


def get_changed_options(options: Any) -> dict[str, Any]:
    """Return the fields of `CheckpointManagerOptions` that differ from their defaults.

    Raises:
        TypeError: If `options` is of another type.
    """
    if not isinstance(options, v0.CheckpointManagerOptions):
        raise TypeError(f"{type(options).__name__} is not CheckpointManagerOptions")
    default = v0.CheckpointManagerOptions()
    fields = {field.name: getattr(options, field.name) for field in dataclasses.fields(options)}
    return {name: value for name, value in fields.items() if value != getattr(default, name)}


def get_items(args: Any) -> tuple[dict[str, Any], bool]:
    """Return the items that Orbax's managers are given to save or restore, by name, and whether they had names.

    A single argument without a name is the item "default", as in Orbax.
    """
    named = isinstance(args, Mapping)
    given = args if named else {"default": args}
    items = {name: value.item if isinstance(value, v0.args.CheckpointArgs) else value for name, value in given.items()}
    return items, named


def make_composite(items: Mapping[str, Any]) -> Any:
    """Return items as Orbax's managers return them: by key and by attribute."""
    return v0.args.Composite(**items)
