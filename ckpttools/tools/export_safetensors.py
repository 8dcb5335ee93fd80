# SPDX-License-Identifier: Apache-2.0
"""`export_safetensors`: write the weights of a step or of a live model to a safetensors file."""

import contextlib
import json
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ..errors import CheckpointError, LeafError, StructureError, suggest_names
from ..sources.open_source import Location, Source, find_step, open_source
from ..spec.mirror import Mirror
from ..store import leaf_integrity, path_kinds
from ..store.formats import safetensors_format
from ..store.formats.foreign_layouts import describe_writer
from ..store.formats.safetensors_format import CODES, Tensor
from ..tree import snapshot
from ..tree.leaf_paths import Path
from ..tree.records import Record, count_host_bytes, get_host_shape
from .tensor_names import KEY, VALUE, NameMap, exclude_skipped, format_tensor_name, name_leaves

_BATCH_BYTES = 256 << 20


type LoadArrays = Callable[[Sequence[Record]], Mapping[Path, np.ndarray[Any, Any]]]
type Weights = tuple[tuple[Record, ...], LoadArrays, dict[str, str]]
"""The leaves of an item, a function that reads some of them, and what the header says of their origin."""


def export_safetensors(
    source: Any,
    file: str | os.PathLike[str],
    *,
    item: str = "model",
    names: NameMap | None = None,
    skip: Sequence[str] = (),
    metadata: Mapping[str, str] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[str, ...]:
    """Write the leaves of a stored step, or of a live model, to a safetensors file.

    Args:
        source: The directory of a run (its newest step is used) or of one step, a mirror or its address, or a state:
            an nnx module, an `nnx.State`, a pytree of arrays.
        file: The file; an existing one is replaced.
        item: Which item of the step.
        names: Names of leaves in the file, such as `{"layers.*.kernel": "h.*.weight"}`; all others keep their path.
        skip: Patterns of leaves to omit.
        metadata: Strings for the header; by default the format "pt", which transformers requires.
        progress: Called with the bytes written so far and the bytes in total.

    Returns:
        The names of the tensors.

    Raises:
        LeafError: If a leaf has a dtype that the format lacks.
        StructureError: If two leaves would have the same name.
        StepDamagedError: If the step is damaged.
        NotARunError: If the file would be in a step of a run, or in its control directory.
        StorageError: If the disk refused.

    Example:
        >>> import pathlib, tempfile
        >>> import jax.numpy as jnp
        >>> import ckpttools as ct
        >>> file = pathlib.Path(tempfile.mkdtemp(), "model.safetensors")
        >>> ct.export_safetensors({"kernel": jnp.ones((2, 3))}, file, names={"kernel": "weight"})
        ('weight',)
    """
    path_kinds.require_outside_steps(file, "a file in a step is not part of it, and one in its place hides it.")
    if isinstance(source, str | os.PathLike | Mirror):
        opened: contextlib.AbstractContextManager[Weights] = _open_step(source, item)
    else:
        opened = contextlib.nullcontext(_open_state(source, item))
    with opened as weights:
        return _export(weights, pathlib.Path(file), item, names, skip, metadata, progress)


def _export(
    weights: Weights,
    file: pathlib.Path,
    item: str,
    names: NameMap | None,
    skip: Sequence[str],
    metadata: Mapping[str, str] | None,
    progress: Callable[[int, int], None] | None,
) -> tuple[str, ...]:
    records, load, note = weights
    records = exclude_skipped(records, skip)
    named = name_leaves(records, names)
    tensors = {name: _make_tensor(item, record) for name, record in named.items() if record.kind != "value"}
    total, done = count_host_bytes(named.values()), 0

    def load_batch(batch: Sequence[str]) -> dict[str, np.ndarray[Any, Any]]:
        nonlocal done
        loaded = load([named[name] for name in batch if named[name].is_in_orbax])
        done += count_host_bytes(named[name] for name in batch)
        if progress is not None:
            progress(done, total)
        return {name: loaded.get(named[name].path, np.empty(*get_host_shape(named[name]))) for name in batch}

    header = {"format": "pt"} if metadata is None else dict(metadata)
    header |= {KEY + name: record.dtype for name, record in named.items() if record.kind == "key"}
    header |= {VALUE + name: json.dumps(record.value) for name, record in named.items() if record.kind == "value"}
    safetensors_format.write(file, tensors, load_batch, {**note, **header}, batch_bytes=_BATCH_BYTES)
    return tuple(tensors)


@contextlib.contextmanager
def _open_step(location: Location, item: str) -> Iterator[Weights]:
    with open_source(location) as source:
        yield _read_step(source, item)


def _read_step(source: Source, item: str) -> Weights:
    entry = find_step(source)
    if entry.manifest is None:
        raise CheckpointError(
            what=f"step {entry.step} of {source.name} was written by {describe_writer(entry.path)} and has no "
            "manifest.",
            why="exported leaves are verified by the digests in the manifest.",
            fix=source.fix,
        )
    stored = entry.manifest.contents.items
    if item not in stored:
        raise StructureError(
            what=f"step {entry.step} has no item {item!r}.",
            why=f"it holds {', '.join(stored) or 'nothing'}.",
            fix=suggest_names(item, stored) or f"item={next(iter(stored), 'model')!r}",
        )

    def load(records: Sequence[Record]) -> Mapping[Path, np.ndarray[Any, Any]]:
        if entry.fetch is not None:
            entry.fetch()
        return leaf_integrity.read_verified(entry, {item: tuple(records)})[item] if records else {}

    return stored[item].records, load, {"ckpttools.step": str(entry.step)}


def _open_state(state: Any, item: str) -> Weights:
    taken = snapshot.take({item: state}, None).items[item]
    return taken.records, lambda records: taken.host_arrays, {}


def _make_tensor(item: str, record: Record) -> Tensor:
    shape, dtype = get_host_shape(record)
    if dtype.name not in CODES:
        raise LeafError(
            what=f"{format_tensor_name(item, record)} is of dtype {dtype.name}, which safetensors does not have.",
            why="storing it as another dtype would change its meaning for every reader.",
            fix=f"leave it out with skip=({format_tensor_name('', record)!r},), or cast it to {', '.join(CODES)}.",
        )
    return Tensor(dtype.name, shape)
