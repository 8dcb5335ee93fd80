# SPDX-License-Identifier: Apache-2.0
"""`import_safetensors`: fill a state from a safetensors file; shapes and dtypes must match."""

import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..errors import StructureError, suggest_names
from ..spec.state import DEFAULT_RULES, find_exclusion
from ..store.formats import safetensors_format
from ..store.formats.safetensors_format import Tensor
from ..tree import flatten, snapshot
from ..tree.leaf_paths import Path, to_names
from ..tree.leaves import describe
from ..tree.records import Record, get_host_shape, parse_dtype
from ..tree.write_back import HostItem, fill_state
from .tensor_names import NameMap, exclude_skipped, name_leaves, read_value


def import_safetensors(
    file: str | os.PathLike[str],
    state: Any,
    *,
    names: NameMap | None = None,
    skip: Sequence[str] = (),
    allow_extra: bool = False,
) -> Any:
    """Fill a state from a safetensors file; shapes and dtypes must be those of the state.

    Args:
        file: The file.
        state: An nnx module (filled in place), an `nnx.State` or a pytree of arrays.
        names: Names of the leaves in the file, as for `export_safetensors`.
        skip: Patterns of leaves that stay as they are.
        allow_extra: Whether the file may hold tensors that the state lacks.

    Returns:
        The filled state: `state` itself if it is a live object.

    Raises:
        TensorFileError: If the file is not a complete safetensors file.
        StructureError: If a name, shape or dtype does not match; the state is unchanged, and each is listed.

    Example:
        >>> import pathlib, tempfile
        >>> import jax.numpy as jnp
        >>> import ckpttools as ct
        >>> file = pathlib.Path(tempfile.mkdtemp(), "model.safetensors")
        >>> names = ct.export_safetensors({"kernel": jnp.ones(3)}, file)
        >>> ct.import_safetensors(file, {"kernel": jnp.zeros(3)})["kernel"]
        Array([1., 1., 1.], dtype=float32)
    """
    path = pathlib.Path(file)
    tensors, header = safetensors_format.read_header(path)
    flat = flatten.flatten_item(
        state, template=True, find_reason=lambda path, types: find_exclusion(DEFAULT_RULES, ("state", *path), types)
    )
    if flat.skeletons:
        raise StructureError(
            what="the state holds objects with get_state and set_state.",
            why="a safetensors file holds arrays only.",
            fix="pass the model without its data iterator.",
        )
    records = tuple(describe("", leaf) for leaf in flat.leaves)
    named = name_leaves(exclude_skipped(records, skip), names)
    lines, placed = [], {}
    for name, record in named.items():
        placed[record.path], line = _match_leaf(name, record, tensors, header)
        lines += [line] if line else []
    extra = [name for name in tensors if name not in named]
    lines += [] if allow_extra else [f"{name}: in the file, not in the state" for name in extra]
    if lines:
        raise _make_mismatch_error(path, lines, extra)
    source = {record.path: tensors[name] for name, record in named.items() if name in tensors}
    arrays = _LazyArrays(path, source, _take_arrays(state, [each for each in records if each.path not in placed]))
    used = [placed.get(record.path, record) for record in records]
    filled = HostItem(
        records={to_names(record.path): record for record in used}, restored_records=used, skeletons={}, arrays=arrays
    )
    return fill_state({"state": state}, {"state": filled})["state"]


class _LazyArrays(dict[Path, np.ndarray[Any, Any]]):
    """Arrays that are read when they are popped, so that the host holds one at a time."""

    def __init__(self, file: pathlib.Path, tensors: Mapping[Path, Tensor], arrays: Mapping[Path, Any]) -> None:
        super().__init__(arrays)
        self._file, self._tensors = file, tensors

    def pop(self, path: Path) -> np.ndarray[Any, Any]:  # type: ignore[override]
        """Read and return the array of a leaf; each is requested once."""
        return safetensors_format.read(self._file, self._tensors[path]) if path in self._tensors else super().pop(path)


def _take_arrays(state: Any, records: Sequence[Record]) -> dict[Path, np.ndarray[Any, Any]]:
    if not records:
        return {}
    arrays = snapshot.take({"state": state}, None).items["state"].host_arrays
    return {record.path: arrays[record.path] for record in records if record.is_in_orbax}


def _match_leaf(
    name: str, record: Record, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> tuple[Record, str | None]:
    """Return a leaf's record, and a line that says why the file does not match it; None if it does."""
    if record.kind == "value":
        return read_value(name, record, metadata)
    if name not in tensors:
        near = suggest_names(name, tensors)
        return record, f"{name}: not in the file{'; ' + near if near.startswith('did') else ''}"
    shape, dtype = get_host_shape(record)
    found = tensors[name]
    if (found.shape, parse_dtype(found.dtype)) != (shape, dtype):
        here = f"{dtype.name}[{','.join(map(str, shape))}]"
        return record, f"{name}: {found.dtype}[{','.join(map(str, found.shape))}] in the file, {here} in the state"
    return record, None


def _make_mismatch_error(path: pathlib.Path, lines: Sequence[str], extra: Sequence[str]) -> StructureError:
    shown = "".join(f"\n    {line}" for line in lines[:40])
    error = StructureError(
        what=f"{path} does not match the state:{shown}" + ("\n    ..." if len(lines) > 40 else ""),
        why="nothing was changed; shapes and dtypes must be equal.",
        fix="names={...} renames leaves, skip=(...) leaves leaves of the state unchanged"
        + (", allow_extra=True" if extra else "")
        + ".",
    )
    error.mismatches = tuple(lines)
    return error
