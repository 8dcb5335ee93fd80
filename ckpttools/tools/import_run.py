# SPDX-License-Identifier: Apache-2.0
"""`import_run`: create a run from a safetensors file, so that foreign weights are restored like any others."""

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
from ..store.formats import safetensors_format
from ..store.run_directory import RunDirectory
from ..tree.leaf_paths import Path
from ..tree.records import Record, decode_value
from .tensor_names import KEY, VALUE, NameMap, exclude_skipped, format_tensor_name, name_leaves, read_value


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
    """Create a run whose first step holds the tensors of a safetensors file; restoring it fills any state that fits.

    Args:
        file: The file.
        directory: The run's directory, which must hold no steps.
        step: Number of the step.
        item: Name of the item.
        names: Names of leaves to names of tensors, as for `export_safetensors`; applied in reverse.
        skip: Patterns of leaves to omit.
        progress: Called with the bytes read so far and the bytes of the file.

    Returns:
        The number of leaves of the step.

    Raises:
        TensorFileError: If the file is not a complete safetensors file.
        NotRestoredError: If the directory holds steps.

    Example:
        >>> import pathlib, tempfile
        >>> import jax.numpy as jnp
        >>> import ckpttools as ct
        >>> directory = pathlib.Path(tempfile.mkdtemp())
        >>> names = ct.export_safetensors({"kernel": jnp.ones(3)}, directory / "model.safetensors")
        >>> ct.import_run(directory / "model.safetensors", directory / "run")
        1
    """
    path, run = pathlib.Path(file), RunDirectory(pathlib.Path(directory).absolute())
    if run.is_used():
        raise NotRestoredError(
            what=f"{directory} holds steps.",
            why="imported weights start a run; inside another run they would look like a step of its training.",
            fix="import into a new directory, and ct.load(directory, state) from it.",
        )
    tensors, header = safetensors_format.read_header(path)
    values = {name.removeprefix(VALUE): text for name, text in header.items() if name.startswith(VALUE)}
    records = [Record(path=tuple(name.split(".")), kind="array") for name in (*tensors, *values)]
    reversed_names = {target: pattern for pattern, target in (names or {}).items()}
    leaves: dict[Path, str] = {
        tuple(leaf.split(".")): format_tensor_name("", record)
        for leaf, record in name_leaves(records, reversed_names).items()
    }
    imported = {record.path for record in exclude_skipped([Record(path=leaf, kind="array") for leaf in leaves], skip)}
    state: dict[str, Any] = {}
    done = 0
    for leaf in sorted(imported, key=len, reverse=True):
        name = leaves[leaf]
        value = (
            _decode_stored_value(name, values[name]) if name in values else safetensors_format.read(path, tensors[name])
        )
        done += getattr(value, "nbytes", 0)
        if progress is not None:
            progress(done, path.stat().st_size)
        if KEY + name in header:
            value = jax.random.wrap_key_data(jnp.asarray(value), impl=header[KEY + name])
        _put(state, leaf, value)
    with Session(CheckpointSpec(directory=os.fspath(directory), storage=Storage(asynchronous=False))) as session:
        session.save(step, {item: state}, reason=f"imported from {path.name}")
    return len(imported)


def _decode_stored_value(name: str, text: str) -> Any:
    record, line = read_value(name, Record(path=(), kind="value"), {VALUE + name: text})
    if line is not None:
        raise TensorFileError(
            what=f"the metadata of the file holds an invalid value: {line}.",
            why="plain values are stored in the header as strings, and this one cannot be decoded.",
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
            why="a leaf cannot also be a dict of leaves.",
            fix="rename one of them with names={...}.",
        )
    state[last] = value
