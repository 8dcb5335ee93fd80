# SPDX-License-Identifier: Apache-2.0
"""Leaves: what one entry of a state is, and how it is written down.

A leaf is an array that goes to Orbax (`array`, `key`), or something that stands in the manifest: an array without
elements (`empty`; Orbax refuses those) or a plain value (`value`). Typed PRNG keys are kept as their key data on
the host, which can be copied, hashed and compared like any array.
"""

import base64
import dataclasses
import functools
import math
from collections.abc import Iterable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from ..errors import CorruptStepError, LeafError

type Path = tuple[str | int, ...]
type Kind = Literal["array", "key", "empty", "value"]
type Slice = tuple[tuple[int, int], ...]
"""A part of an array: where it begins and ends in each dimension."""


def format_leaf_name(item: str, path: Path) -> str:
    """The name by which a leaf is shown: `model.layers.0.kernel`."""
    return ".".join([item, *map(str, path)])


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One entry of a state, as it stands in the program (arrays may be abstract in a template)."""

    path: Path
    value: Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
    """One leaf as the manifest describes it.

    Attributes:
        path: Keys from the item's root.
        kind: Where the leaf is stored and how it is read back.
        shape: Shape, of the typed array for a key.
        dtype: Name of the dtype; for a key, the name of its implementation.
        scalar: Whether the array was a numpy scalar or a weakly typed JAX scalar, which come back as such.
        digest: Digest of the bytes of an `array` or `key`.
        value: The encoded value of a `value`, or the bytes of an array that stands in the manifest.
        slices: For an array that several processes held, a digest for each part instead of one for the whole.
    """

    path: Path
    kind: Kind
    shape: tuple[int, ...] = ()
    dtype: str = ""
    scalar: Literal["", "numpy", "weak"] = ""
    digest: str = ""
    value: Any = None
    slices: tuple[tuple[Slice, str], ...] = ()

    @property
    def is_in_orbax(self) -> bool:
        """Whether Orbax stores this leaf."""
        return self.value is None and (self.kind == "array" or (self.kind == "key" and 0 not in self.shape))

    def to_json(self) -> dict[str, Any]:
        """The record without its defaults, paths as lists."""
        plain = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        plain["path"], plain["shape"] = list(self.path), list(self.shape)
        if self.kind == "value" and self.value == "":
            return {"path": plain["path"], "kind": "value", "value": ""}
        return {key: value for key, value in plain.items() if value not in ("", [], (), None) or key == "path"}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Record":
        """Read what `to_json` wrote; a wrong form raises `CorruptStepError`."""
        try:
            plain = {**data, "path": tuple(data["path"]), "shape": tuple(data.get("shape", ()))}
            plain["slices"] = tuple(_parse_slice(entry, plain["shape"]) for entry in data.get("slices", ()))
            record = cls(**plain)
            legal = (
                record.kind in ("array", "key", "empty", "value")
                and all(type(part) in (str, int) for part in record.path)
                and all(type(size) is int and 0 <= size < 2**48 for size in record.shape)
                and math.prod(record.shape) < 2**56
                and isinstance(record.dtype, str)
                and isinstance(record.digest, str)
                and (record.kind != "empty" or 0 in record.shape)
            )
            # Values and dtypes are read once here, so that nothing can fail when the live state is being replaced.
            decode_value(record.value)
            if record.kind != "value":
                get_host_shape(record)
                read_inline_array(record)
        except (TypeError, KeyError, ValueError) as error:
            raise CorruptStepError(what=f"a leaf of the manifest cannot be read: {error}.") from error
        if not legal:
            raise CorruptStepError(what=f"a leaf of the manifest makes no sense: {data!r:.200}.")
        return record


def is_key(value: Any) -> bool:
    """Whether `value` is a typed PRNG key array, concrete or abstract."""
    dtype = getattr(value, "dtype", None)
    return dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)


def is_array(value: Any) -> bool:
    """Whether `value` is an array, concrete or abstract, or a numpy scalar."""
    return isinstance(value, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct)


def describe(item: str, leaf: Leaf) -> Record:
    """The record of a leaf, without its digest.

    Raises:
        LeafError: If the leaf is of a type that cannot be stored.
    """
    value = leaf.value
    if not is_array(value):
        return Record(path=leaf.path, kind="value", value=encode_value(format_leaf_name(item, leaf.path), value))
    shape = tuple(value.shape)
    if is_key(value):
        return Record(path=leaf.path, kind="key", shape=shape, dtype=_get_key_implementation(value))
    if isinstance(value, np.ma.MaskedArray):
        raise LeafError(
            what=f"{format_leaf_name(item, leaf.path)} is a masked array.",
            why="only its data would be stored, and its mask lost.",
            fix="store both as arrays: {'data': x.data, 'mask': np.ma.getmaskarray(x)}.",
        )
    dtype = np.dtype(value.dtype)
    if dtype.hasobject or (dtype.kind in "SUVmM" and dtype.name not in _ML_DTYPES):
        raise LeafError(
            what=f"{format_leaf_name(item, leaf.path)} is an array of dtype {dtype}.",
            why="only numbers and booleans have one form on every machine; an object array would need pickle.",
            fix="store numbers, or turn the array into a list of strings.",
        )
    if math.prod(shape) and dtype.name not in _WRITABLE_DTYPES:
        raise LeafError(
            what=f"{format_leaf_name(item, leaf.path)} is an array of dtype {dtype}.",
            why="TensorStore, which writes the arrays, has no such type.",
            fix="keep it in a wider type, such as uint8 for uint4 or float64 for longdouble.",
        )
    scalar: Literal["", "numpy", "weak"] = ""
    if isinstance(value, np.generic):
        scalar = "numpy"
    elif shape == () and getattr(value, "weak_type", False):
        scalar = "weak"
    kind: Kind = "empty" if math.prod(shape) == 0 else "array"
    return Record(path=leaf.path, kind=kind, shape=shape, dtype=dtype.name, scalar=scalar)


_ML_DTYPES = frozenset(
    name for name in dir(jnp) if name.startswith(("bfloat", "float", "int", "uint")) and hasattr(jnp, name)
)

_WRITABLE_DTYPES = frozenset(
    {"bool", "bfloat16", "float4_e2m1fn", "complex64", "complex128"}
    | {f"int{bits}" for bits in (2, 4, 8, 16, 32, 64)}
    | {f"uint{bits}" for bits in (8, 16, 32, 64)}
    | {f"float{bits}" for bits in (16, 32, 64)}
    | {f"float8_{form}" for form in ("e3m4", "e4m3b11fnuz", "e4m3fn", "e4m3fnuz", "e5m2", "e5m2fnuz", "e8m0fnu")}
)
"""Dtypes that TensorStore writes; for any other it fails in a thread of its own, with no leaf named."""


def parse_dtype(name: str) -> np.dtype[Any]:
    """The dtype of a record; only names of numbers are known, so nothing can be imported by a manifest."""
    try:
        dtype = np.dtype(getattr(jnp, name)) if name in _ML_DTYPES else np.dtype(name)
    except TypeError as error:
        raise CorruptStepError(what=f"the manifest names an unknown dtype {name!r}.") from error
    if name not in _ML_DTYPES and dtype.kind not in "biufc":
        raise CorruptStepError(what=f"the manifest names the dtype {name!r}, which is no number.")
    return dtype


def get_host_shape(record: Record) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Shape and dtype of the array that stands on the host for a record (key data, for a key)."""
    if record.kind != "key":
        return record.shape, parse_dtype(record.dtype)
    data = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(record.shape, get_key_dtype(record.dtype)))
    return tuple(data.shape), np.dtype(data.dtype)


@functools.cache
def get_key_dtype(implementation: str) -> Any:
    """The dtype of typed keys of an implementation such as "threefry2x32"."""
    try:
        return jax.eval_shape(lambda: jax.random.key(0, impl=implementation)).dtype
    except ValueError as error:
        raise CorruptStepError(what=f"the manifest names an unknown key implementation {implementation!r}.") from error


def _get_key_implementation(key: Any) -> str:
    """The name of a key's implementation, also of an abstract one, whose dtype only shows a tag of it."""
    if isinstance(key, jax.Array):
        return str(jax.random.key_impl(key))
    for name in ("threefry2x32", "rbg", "unsafe_rbg"):
        if get_key_dtype(name) == key.dtype:
            return name
    raise LeafError(
        what=f"an abstract key has the unknown dtype {key.dtype}.",
        why="only the implementations that come with JAX can be told from a dtype.",
        fix="pass a concrete state as the template.",
    )


def count_host_bytes(records: Iterable[Record]) -> int:
    """Bytes that the arrays of `records` take, on the host and, uncompressed, on the disk."""
    total = 0
    for record in records:
        if record.is_in_orbax:
            shape, dtype = get_host_shape(record)
            total += math.prod(shape) * dtype.itemsize
    return total


def _parse_slice(entry: Any, shape: tuple[int, ...]) -> tuple[Slice, str]:
    ranges, mark = entry
    part = tuple((int(start), int(stop)) for start, stop in ranges)
    # A key's data has a dimension more than the key.
    if not isinstance(mark, str) or not all(0 <= start < stop for start, stop in part) or len(part) < len(shape):
        raise ValueError(f"a part {entry!r:.100} of an array makes no sense")
    return part, mark


def read_inline_array(record: Record) -> np.ndarray[Any, Any] | None:
    """The host array of a record that stands in the manifest; None if it is stored elsewhere or a plain value.

    Raises:
        CorruptStepError: If its bytes are not those of such an array.
    """
    if record.value is None or record.kind not in ("array", "key"):
        return None
    shape, dtype = get_host_shape(record)
    data = decode_value(record.value)
    if not isinstance(data, bytes) or len(data) != math.prod(shape) * dtype.itemsize:
        raise CorruptStepError(what=f"an array of the manifest has not the bytes of {record.dtype}{list(shape)}.")
    return np.frombuffer(data, dtype).reshape(shape).copy()


def encode_value(name: str, value: Any) -> Any:
    """A plain value as JSON; types that JSON lacks are tagged with their name."""
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
    """The value that `encode_value` was given."""
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
