# SPDX-License-Identifier: Apache-2.0
"""`export_safetensors`: write the weights of a step or of a live model to a safetensors file."""

import json
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ..errors import CheckpointError, LeafError, StructureError, suggest_names
from ..store import layout, leaf_integrity, safetensors_format
from ..store.catalogue import Entry
from ..store.safetensors_format import CODES, Tensor
from ..tree import snapshot
from ..tree.leaf_paths import Path
from ..tree.records import Record, count_host_bytes, get_host_shape
from .show import find_step
from .tensor_names import KEY, VALUE, NameMap, exclude_skipped, format_tensor_name, name_leaves

_BATCH_BYTES = 256 << 20


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
        source: Directory of a run (its newest step is used) or of one step, or a state: an nnx module, an
            `nnx.State`, a pytree of arrays.
        file: The file; an existing one is replaced.
        item: Which item of the step.
        names: Names of leaves in the file, such as `{"layers.*.kernel": "h.*.weight"}`; all others keep their path.
        skip: Patterns of leaves to leave out.
        metadata: Strings for the header; by default the format "pt", which transformers requires.
        progress: Called with the bytes written so far and the bytes in total.

    Returns:
        The names of the tensors.

    Raises:
        LeafError: If a leaf has a dtype that the format lacks.
        StructureError: If two leaves would have the same name.
        StepDamagedError: If the step is damaged.
        StorageError: If the disk refused.

    Example:
        >>> import pathlib, tempfile
        >>> import jax.numpy as jnp
        >>> import ckpttools as ct
        >>> file = pathlib.Path(tempfile.mkdtemp(), "model.safetensors")
        >>> ct.export_safetensors({"kernel": jnp.ones((2, 3))}, file, names={"kernel": "weight"})
        ('weight',)
    """
    if isinstance(source, str | os.PathLike):
        records, load, note = _open_step(pathlib.Path(source), item)
    else:
        records, load, note = _open_state(source, item)
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
    safetensors_format.write(pathlib.Path(file), tensors, load_batch, {**note, **header}, batch_bytes=_BATCH_BYTES)
    return tuple(tensors)


type LoadArrays = Callable[[Sequence[Record]], Mapping[Path, np.ndarray[Any, Any]]]


def _open_step(directory: pathlib.Path, item: str) -> tuple[tuple[Record, ...], LoadArrays, dict[str, str]]:
    step = layout.parse_step_number(directory.absolute().name)
    is_step = step is not None and any(
        (directory / name).exists() for name in (layout.MANIFEST, "_CHECKPOINT_METADATA")
    )
    entry: Entry = find_step(directory.absolute().parent, step) if is_step else find_step(directory)
    if entry.manifest is None:
        raise CheckpointError(
            what=f"step {entry.step} was written by plain Orbax and has no manifest.",
            why="exported leaves are verified by the digests in the manifest.",
            fix="ct.adopt(directory) adds one.",
        )
    stored = entry.manifest.contents.items
    if item not in stored:
        raise StructureError(
            what=f"step {entry.step} has no item {item!r}.",
            why=f"it holds {', '.join(stored) or 'nothing'}.",
            fix=suggest_names(item, stored) or f"item={next(iter(stored), 'model')!r}",
        )

    def load(records: Sequence[Record]) -> Mapping[Path, np.ndarray[Any, Any]]:
        return leaf_integrity.read_verified(entry, {item: tuple(records)})[item] if records else {}

    return stored[item].records, load, {"ckpttools.step": str(entry.step)}


def _open_state(state: Any, item: str) -> tuple[tuple[Record, ...], LoadArrays, dict[str, str]]:
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
