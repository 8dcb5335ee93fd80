# SPDX-License-Identifier: Apache-2.0
"""A run from a safetensors file, so that weights from elsewhere are restored like any others."""

import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ..errors import NotRestoredError, StructureError, TensorFileError
from ..session.session import Session
from ..spec.spec import CheckpointSpec
from ..spec.storage import Storage
from ..store import safetensors_format
from ..store.run_directory import RunDirectory
from ..tree.leaf_paths import Path
from ..tree.records import Record, decode_value
from .safetensors_exchange import KEY, VALUE, NameMap, exclude_skipped, format_tensor_name, name_leaves, read_value


def import_run(
    file: str | os.PathLike[str],
    directory: str | os.PathLike[str],
    *,
    step: int = 1,
    item: str = "model",
    names: NameMap | None = None,
    skip: Sequence[str] = (),
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Make a run whose first step holds the tensors of a safetensors file; restoring it fills any state that fits.

    Args:
        file: The file.
        directory: The run's folder, which must hold no steps.
        step: Number of the step.
        item: Name of the item.
        names: From leaves to tensors, as for `export_safetensors`, read backwards.
        skip: Patterns of leaves that are left out.
        progress: Called with the bytes that were read and those of the file.

    Returns:
        How many leaves the step holds.

    Raises:
        TensorFileError: If it is no whole safetensors file.
        NotRestoredError: If the folder holds steps.
    """
    path, run = pathlib.Path(file), RunDirectory(pathlib.Path(directory).absolute())
    if run.is_used():
        raise NotRestoredError(
            what=f"{directory} holds steps.",
            why="weights from elsewhere begin a run; put into one, they would look like a step of its training.",
            fix="a folder of their own, and ct.load(folder, state) where they are wanted.",
        )
    tensors, texts = safetensors_format.read_header(path)
    values = {name.removeprefix(VALUE): text for name, text in texts.items() if name.startswith(VALUE)}
    records = [Record(path=tuple(name.split(".")), kind="array") for name in (*tensors, *values)]
    back = {target: pattern for pattern, target in (names or {}).items()}
    leaves: dict[Path, str] = {
        tuple(leaf.split(".")): format_tensor_name("", record) for leaf, record in name_leaves(records, back).items()
    }
    kept = {record.path for record in exclude_skipped([Record(path=leaf, kind="array") for leaf in leaves], skip)}
    state: dict[str, Any] = {}
    done = 0
    for leaf in sorted(kept, key=len, reverse=True):
        name = leaves[leaf]
        value = (
            _decode_stored_value(name, values[name]) if name in values else safetensors_format.read(path, tensors[name])
        )
        done += getattr(value, "nbytes", 0)
        if progress is not None:
            progress(done, path.stat().st_size)
        if KEY + name in texts:
            value = jax.random.wrap_key_data(jnp.asarray(value), impl=texts[KEY + name])
        _put(state, leaf, value)
    with Session(CheckpointSpec(directory=os.fspath(directory), storage=Storage(asynchronous=False))) as session:
        session.save(step, {item: state}, reason=f"imported from {path.name}")
    return len(kept)


def _decode_stored_value(name: str, text: str) -> Any:
    record, line = read_value(name, Record(path=(), kind="value"), {VALUE + name: text})
    if line is not None:
        raise TensorFileError(
            what=f"a note of the file makes no sense: {line}.",
            why="plain values stand in its header as texts, and this one cannot be read back.",
            fix="export the file again.",
        )
    return decode_value(record.value)


def _put(state: dict[str, Any], path: Path, value: Any) -> None:
    *parents, last = map(str, path)
    for name in parents:
        state = state.setdefault(name, {})
    if last in state:
        raise StructureError(
            what=f"the file has a tensor {'.'.join(map(str, path))!r} and others below that name.",
            why="a leaf cannot be a table at the same time.",
            fix="let names={...} move one of them.",
        )
    state[last] = value
