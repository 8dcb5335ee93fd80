# SPDX-License-Identifier: Apache-2.0
"""Files in the safetensors format: eight bytes of length, a JSON header, the bytes of the tensors.

Read and written here instead of by the package of that name, for two reasons: it returns all tensors at once, where a
state is exchanged leaf by leaf, and its numpy side has no bfloat16 and no float8 in most releases.

The header of a foreign file is trusted only after every name, dtype, shape and offset was checked against the file's
size; then reading a tensor cannot fail in the middle.
"""

import dataclasses
import json
import math
import os
import pathlib
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ...errors import StorageError, TensorFileError
from ...tree.records import parse_dtype

DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
    "C64": "complex64",
}
"""The format's names of dtypes, and numpy's."""

CODES = {name: code for code, name in DTYPES.items()}
_MAX_HEADER_BYTES = 100_000_000
"""The format's limit."""


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor as a header describes it.

    Attributes:
        dtype: Name of its numpy dtype.
        shape: Its shape.
        start: Offset of its bytes in the file.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int = 0

    @property
    def bytes(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * parse_dtype(self.dtype).itemsize


def write(
    path: pathlib.Path,
    tensors: Mapping[str, Tensor],
    read_batch: Callable[[Sequence[str]], Mapping[str, np.ndarray[Any, Any]]],
    metadata: Mapping[str, str],
    *,
    batch_bytes: int,
) -> None:
    """Write a file, a few tensors at a time; it appears under its name when it is complete.

    Args:
        path: The file.
        tensors: Dtype and shape of each tensor.
        read_batch: Returns the arrays of some tensors.
        metadata: Strings for the header.
        batch_bytes: Bytes to request at once, unless a single tensor is larger.

    Raises:
        StorageError: If the disk refused.
    """
    # The widest dtypes first, so that each tensor is aligned; the reference writer does the same.
    order = sorted(tensors, key=lambda name: (-parse_dtype(tensors[name].dtype).itemsize, name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name in order:
        tensor, begin = tensors[name], end
        end += tensor.bytes
        header[name] = {"dtype": CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with temporary.open("xb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for batch in _split_batches(order, tensors, batch_bytes):
                handed = read_batch(batch)
                for name in batch:
                    file.write(np.ascontiguousarray(handed[name]).reshape(-1).view(np.uint8))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if isinstance(error, StorageError):
            raise
        raise StorageError(
            what=f"{path} could not be written: {error}.",
            why="whatever the name held before is unchanged.",
            fix="fix the cause above, or choose another file.",
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def _split_batches(order: Sequence[str], tensors: Mapping[str, Tensor], limit: int) -> list[list[str]]:
    batches: list[list[str]] = []
    room = 0
    for name in order:
        if not batches or tensors[name].bytes > room:
            batches.append([])
            room = limit
        batches[-1].append(name)
        room -= tensors[name].bytes
    return batches


def read_header(path: pathlib.Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and the metadata of a file.

    Raises:
        TensorFileError: If it is not a whole safetensors file.
        StorageError: If it cannot be read.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(_MAX_HEADER_BYTES, size - 8):
                raise _make_format_error(path, "it does not begin with the length of a header")
            header = json.loads(file.read(length), object_pairs_hook=_reject_duplicates)
    except OSError as error:
        raise StorageError(
            what=f"{path} cannot be read: {error}.",
            why="the weights are in it.",
            fix="check the path and its permissions.",
        ) from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, TensorFileError):
            raise
        raise _make_format_error(path, f"its header cannot be read: {error}") from error
    if not isinstance(header, dict):
        raise _make_format_error(path, "its header is not a table")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise _make_format_error(path, "its metadata values are not strings")
    return _parse_tensors(path, header, 8 + length, size), metadata


def _reject_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a name occurs twice")
    return table


def _parse_tensors(path: pathlib.Path, header: Mapping[str, Any], base: int, size: int) -> dict[str, Tensor]:
    tensors, spans = {}, []
    for name, entry in header.items():
        try:
            code, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        except (TypeError, KeyError, ValueError) as error:
            raise _make_format_error(path, f"its entry for {name!r} is malformed") from error
        if not isinstance(code, str) or code not in DTYPES:
            raise _make_format_error(path, f"the tensor {name!r} has the unknown dtype {code!r}")
        if not all(type(number) is int and 0 <= number < 2**56 for number in (*shape, begin, end)):
            raise _make_format_error(path, f"its entry for {name!r} is out of range")
        tensors[name] = Tensor(DTYPES[code], shape, base + begin)
        if end - begin != tensors[name].bytes:
            raise _make_format_error(path, f"the tensor {name!r} has {end - begin} bytes, which do not fit its shape")
        spans.append((begin, end))
    place = 0
    for begin, end in sorted(spans):
        if begin != place:
            raise _make_format_error(path, "its tensors overlap or leave gaps")
        place = end
    if base + place != size:
        raise _make_format_error(path, f"it has {size:,} bytes and its header describes {base + place:,}")
    return tensors


def read(path: pathlib.Path, tensor: Tensor) -> np.ndarray[Any, Any]:
    """Return the array of one tensor."""
    array = np.empty(tensor.shape, parse_dtype(tensor.dtype))
    view = memoryview(array.reshape(-1).view(np.uint8))
    try:
        with path.open("rb", buffering=0) as file:
            file.seek(tensor.start)
            done = 0
            while done < len(view):
                count = file.readinto(view[done:])
                if not count:
                    raise _make_format_error(path, "it was truncated while it was read")
                done += count
    except OSError as error:
        if isinstance(error, StorageError):
            raise
        raise StorageError(
            what=f"{path} cannot be read: {error}.",
            why="its header was readable a moment ago.",
            fix="check the disk, and whether another process changes the file.",
        ) from error
    return array


def _make_format_error(path: pathlib.Path, why: str) -> TensorFileError:
    return TensorFileError(
        what=f"{path} is not a whole safetensors file.",
        why=f"{why}.",
        fix="fetch or export it again; nothing was read.",
    )
