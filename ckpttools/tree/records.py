# SPDX-License-Identifier: Apache-2.0
"""Records: one leaf as the manifest describes it, with its plain values and the dtype and shape of its host array.

Imports no JAX, so that commands which only read manifests start fast.
"""

import base64
import dataclasses
import math
from collections.abc import Iterable
from typing import Any, Literal

import ml_dtypes
import numpy as np

from .. import tree
from ..errors import CorruptStepError, LeafError
from .leaf_paths import Path

ML_DTYPES = frozenset(name for name in dir(ml_dtypes) if name.startswith(("bfloat", "float", "int", "uint")))
"""Names of the dtypes that numpy lacks."""
# uint32 words of the data of one key. Keys of implementations that users register need JAX.
_KEY_DATA_SIZES = {"threefry2x32": 2, "rbg": 4, "unsafe_rbg": 4}

type Kind = Literal["array", "key", "empty", "value"]
"""Where a leaf is stored and how it is read back; see `Record`."""

type Slice = tuple[tuple[int, int], ...]
"""A part of an array: start and stop in each dimension."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
    """One leaf as the manifest describes it.

    Attributes:
        path: Keys from the item's root.
        kind: "array" and "key" for arrays and typed keys, which Orbax stores; "empty" for an array without elements and
            "value" for a plain value, which the manifest stores.
        shape: Shape; for a key, of the typed array.
        dtype: Name of the dtype; for a key, the name of its implementation.
        scalar: "numpy" for a numpy scalar, "weak" for a weakly typed JAX scalar, "" for any other array.
        weak_type: Whether a JAX array with dimensions is weakly typed, such as `jnp.full(4, 0.1)`; for scalars,
            `scalar` records it, which older versions read.
        variable: The type of a recomputed `nnx` variable that the spec does not exclude, such as "Cache"; "" for all
            other leaves.
        digest: Digest of the bytes of an "array" or "key".
        value: The encoded value of a "value", or the bytes of an array that the manifest stores.
        slices: For an array that was sharded across processes, a digest of each shard instead of one of the whole.
    """

    path: Path
    kind: Kind
    shape: tuple[int, ...] = ()
    dtype: str = ""
    scalar: Literal["", "numpy", "weak"] = ""
    digest: str = ""
    value: Any = None
    slices: tuple[tuple[Slice, str], ...] = ()
    weak_type: bool = False
    variable: str = ""

    @property
    def is_in_orbax(self) -> bool:
        """Whether Orbax stores this leaf."""
        return self.value is None and (self.kind == "array" or (self.kind == "key" and 0 not in self.shape))

    def to_json(self) -> dict[str, Any]:
        """Return the record as plain data, without defaults and without the two fields that `store.manifest` adds.

        `weak_type` and `variable` are stored beside the records: earlier versions treat an unknown field of a record as
        damage, and ignore unknown fields beside the records.
        """
        plain = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        del plain["weak_type"], plain["variable"]
        plain["path"], plain["shape"] = list(self.path), list(self.shape)
        if self.kind == "value" and self.value == "":
            return {"path": plain["path"], "kind": "value", "value": ""}
        return {key: value for key, value in plain.items() if value not in ("", [], (), None) or key == "path"}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Record":
        """Return the record that `to_json` encoded.

        Raises:
            CorruptStepError: If it is not one.
        """
        try:
            plain = {**data, "path": tuple(data["path"]), "shape": tuple(data.get("shape", ()))}
            plain["slices"] = tuple(_parse_slice(entry, plain["shape"]) for entry in data.get("slices", ()))
            record = cls(**plain)
            is_valid = (
                record.kind in ("array", "key", "empty", "value")
                and all(type(part) in (str, int) for part in record.path)
                and all(type(size) is int and 0 <= size < 2**48 for size in record.shape)
                and math.prod(record.shape) < 2**56
                and isinstance(record.dtype, str)
                and isinstance(record.digest, str)
                and isinstance(record.weak_type, bool)
                and isinstance(record.variable, str)
                and (record.kind != "empty" or 0 in record.shape)
            )
            # Values and dtypes are decoded once here, so that it cannot fail while the live state is being replaced.
            decode_value(record.value)
            if record.kind != "value":
                get_host_shape(record)
                read_inline_array(record)
        except (TypeError, KeyError, ValueError) as error:
            raise CorruptStepError(what=f"a leaf of the manifest cannot be read: {error}.") from error
        if not is_valid:
            raise CorruptStepError(what=f"a leaf of the manifest is not valid: {data!r:.200}.")
        return record


def parse_dtype(name: str) -> np.dtype[Any]:
    """Return the dtype of a record; only numeric dtypes are accepted, so that a manifest can import nothing.

    Raises:
        CorruptStepError: If `name` is not a numeric dtype.
    """
    try:
        dtype = np.dtype(getattr(ml_dtypes, name)) if name in ML_DTYPES else np.dtype(name)
    except TypeError as error:
        raise CorruptStepError(what=f"the manifest names an unknown dtype {name!r}.") from error
    if name not in ML_DTYPES and dtype.kind not in "biufc":
        raise CorruptStepError(what=f"the manifest names the dtype {name!r}, which is not numeric.")
    return dtype


def get_host_shape(record: Record) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Return shape and dtype of a record's array on the host; those of its data for a key."""
    if record.kind != "key":
        return record.shape, parse_dtype(record.dtype)
    if record.dtype in _KEY_DATA_SIZES:
        return (*record.shape, _KEY_DATA_SIZES[record.dtype]), np.dtype(np.uint32)
    return tree.key_data.get_key_data_shape(record.shape, record.dtype)


def count_host_bytes(records: Iterable[Record]) -> int:
    """Return the bytes that the arrays of `records` take in host memory and, uncompressed, on the disk."""
    total = 0
    for record in records:
        if record.is_in_orbax:
            shape, dtype = get_host_shape(record)
            total += math.prod(shape) * dtype.itemsize
    return total


def _parse_slice(entry: Any, shape: tuple[int, ...]) -> tuple[Slice, str]:
    ranges, digest = entry
    part = tuple((int(start), int(stop)) for start, stop in ranges)
    # The data of a key has one dimension more than the key.
    if not isinstance(digest, str) or not all(0 <= start < stop for start, stop in part) or len(part) < len(shape):
        raise ValueError(f"{entry!r:.100} is not a part of an array")
    return part, digest


def read_inline_array(record: Record) -> np.ndarray[Any, Any] | None:
    """Return the array of a record whose bytes the manifest stores; None for any other record.

    Raises:
        CorruptStepError: If there are too few or too many bytes.
    """
    if record.value is None or record.kind not in ("array", "key"):
        return None
    shape, dtype = get_host_shape(record)
    data = decode_value(record.value)
    if not isinstance(data, bytes) or len(data) != math.prod(shape) * dtype.itemsize:
        raise CorruptStepError(what=f"the bytes of an array of the manifest do not fit {record.dtype}{list(shape)}.")
    return np.frombuffer(data, dtype).reshape(shape).copy()


def encode_value(name: str, value: Any) -> Any:
    """Return a plain value as JSON; types that JSON lacks are tagged with their name.

    Args:
        name: The leaf's name, for errors.
        value: The value.

    Raises:
        LeafError: If it is of a type that cannot be stored.
    """
    if value is None or isinstance(value, bool | str):
        return value if not isinstance(value, str) or value.isascii() else {"str": value}
    if type(value) is int:
        return value if abs(value) < 2**53 else {"int": hex(value)}
    if type(value) is float:
        return {"float": value.hex()}
    if isinstance(value, complex) and not isinstance(value, np.generic):
        return {"complex": [value.real.hex(), value.imag.hex()]}
    if isinstance(value, bytes | bytearray):
        return {"bytes": base64.b64encode(bytes(value)).decode()}
    raise LeafError(
        what=f"{name} is a {type(value).__module__}.{type(value).__qualname__}, which cannot be stored.",
        why="a checkpoint holds arrays, typed keys, numbers, strings, bytes and None: reading it runs no code.",
        fix="give the object get_state() and set_state(state), or leave it out of the state.",
    )


def decode_value(encoded: Any) -> Any:
    """Return the value that `encode_value` encoded.

    Raises:
        CorruptStepError: If it is not one.
    """
    if not isinstance(encoded, dict):
        return encoded
    try:
        ((tag, data),) = encoded.items()
        match tag:
            case "str":
                return str(data)
            case "int":
                return int(data, 0)
            case "float":
                return float.fromhex(data)
            case "complex":
                return complex(float.fromhex(data[0]), float.fromhex(data[1]))
            case "bytes":
                return base64.b64decode(data, validate=True)
    except (ValueError, TypeError, IndexError) as error:
        raise CorruptStepError(what=f"a value of the manifest cannot be read: {error}.") from error
    raise CorruptStepError(what=f"a value of the manifest is of unknown type {tag!r}.")


def format_form(record: Record) -> str:
    """Return a leaf's dtype and shape, such as "float32[2,3]"; "a plain value" for a plain value."""
    if record.kind == "value":
        return "a plain value"
    prefix = "key " if record.kind == "key" else ""
    return f"{prefix}{record.dtype}[{','.join(map(str, record.shape))}]"
