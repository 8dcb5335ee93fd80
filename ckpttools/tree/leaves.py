# SPDX-License-Identifier: Apache-2.0
"""Leaves: one entry of a live state, and the record that describes it.

A leaf is an array that Orbax stores (`array`, `key`), or something that the manifest stores: an array without
elements (`empty`; Orbax refuses those) or a plain value (`value`). Typed PRNG keys are handled as their key data on
the host, which can be copied, hashed and compared like any array.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ..errors import LeafError
from ..spec.state import RECOMPUTED
from .key_data import get_key_dtype
from .leaf_paths import Path, format_leaf_name
from .records import ML_DTYPES, Kind, Record, encode_value


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One entry of a live state.

    Attributes:
        path: Keys from the item's root.
        value: The array or plain value; arrays may be abstract in a template.
        types: The names of the type of its `nnx` variable and of that type's bases; () outside a variable.
        aliases: Other paths that lead to the same variable, as far as they were looked for.
    """

    path: Path
    value: Any
    types: tuple[str, ...] = ()
    aliases: tuple[Path, ...] = ()


@functools.cache
def list_variable_types(kind: type[nnx.Variable[Any]]) -> tuple[str, ...]:
    """Return the name of a variable's type and those of its bases, the nearest first.

    The names that a spec leaves out by default stand for flax's own types: a user's class of that name, and a trained
    parameter that derives from one of them, are not left out by it.
    """
    is_trained = issubclass(kind, nnx.Param)
    bases = [base for base in kind.__mro__ if issubclass(base, nnx.Variable)]
    return tuple(
        base.__name__
        for base in bases
        if base.__name__ not in RECOMPUTED or (base in (nnx.Cache, nnx.Intermediate) and not is_trained)
    )


_MAX_ALIASES = 64


def find_alias_paths(root: nnx.Pytree) -> Callable[[Path], tuple[Path, ...]]:
    """Return a function from the path of a variable to the other paths that lead to it; walks once over the object."""
    groups: list[list[tuple[Any, ...]]] = []
    for paths in nnx.find_duplicates(root):
        # A path that goes through the object itself leads round in a circle.
        group = [path for path in paths if not any(_is_longer(path, other) for other in paths)]
        groups += [group] if len(group) > 1 else []

    def list_others(path: Path) -> tuple[Path, ...]:
        found = [path]
        for known in found:
            for group in groups if len(found) < _MAX_ALIASES else ():
                for old in group:
                    if known[: len(old)] == old:
                        others = ((*new, *known[len(old) :]) for new in group)
                        found += [other for other in others if other not in found]
        return tuple(found[1:])

    return list_others


def _is_longer(path: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    return len(path) > len(other) and path[: len(other)] == other


def is_key(value: Any) -> bool:
    """Whether `value` is a typed PRNG key array, concrete or abstract."""
    dtype = getattr(value, "dtype", None)
    return dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)


def is_array(value: Any) -> bool:
    """Whether `value` is an array, concrete or abstract, or a numpy scalar."""
    return isinstance(value, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct)


def describe(item: str, leaf: Leaf) -> Record:
    """Return the record of a leaf, without its digest.

    Args:
        item: Name of the leaf's item, for errors.
        leaf: The leaf.

    Raises:
        LeafError: If the leaf is of a type that cannot be stored.
    """
    if leaf.types and (recomputed := next((name for name in leaf.types if name in RECOMPUTED), "")):
        # Such a leaf is saved only if the spec does not exclude it; a later restore whose spec does must recognise it.
        plain = describe(item, dataclasses.replace(leaf, types=()))
        return dataclasses.replace(plain, variable=recomputed)
    value = leaf.value
    if isinstance(value, jax.core.Tracer):
        raise LeafError(
            what=f"{format_leaf_name(item, leaf.path)} is a tracer: this call is inside a function that JAX traces.",
            why="inside jit, grad or scan a tracer has no value that could be saved or replaced.",
            fix="return the state from the function, and call step, save, restore or load outside it.",
        )
    if not is_array(value):
        return Record(path=leaf.path, kind="value", value=encode_value(format_leaf_name(item, leaf.path), value))
    shape = tuple(value.shape)
    if is_key(value):
        return Record(path=leaf.path, kind="key", shape=shape, dtype=_get_key_implementation(value))
    if isinstance(value, np.ma.MaskedArray):
        raise LeafError(
            what=f"{format_leaf_name(item, leaf.path)} is a masked array.",
            why="only its data would be stored, and its mask would be lost.",
            fix="store both as arrays: {'data': x.data, 'mask': np.ma.getmaskarray(x)}.",
        )
    dtype = np.dtype(value.dtype)
    if dtype.hasobject or (dtype.kind in "SUVmM" and dtype.name not in ML_DTYPES):
        raise LeafError(
            what=f"{format_leaf_name(item, leaf.path)} is an array of dtype {dtype}.",
            why="only numbers and booleans have the same bytes on every machine; an object array would need pickle.",
            fix="store numbers, or convert the array to a list of strings.",
        )
    if math.prod(shape) and dtype.name not in _WRITABLE_DTYPES:
        raise LeafError(
            what=f"{format_leaf_name(item, leaf.path)} is an array of dtype {dtype}.",
            why="TensorStore, which writes the arrays, does not have that type.",
            fix="convert it to another type, such as uint8 for uint4 or float64 for longdouble.",
        )
    scalar: Literal["", "numpy", "weak"] = ""
    is_weak = getattr(value, "weak_type", False) and not isinstance(value, np.generic)
    if isinstance(value, np.generic):
        scalar = "numpy"
    elif shape == () and is_weak:
        scalar = "weak"
    kind: Kind = "empty" if math.prod(shape) == 0 else "array"
    return Record(
        path=leaf.path, kind=kind, shape=shape, dtype=dtype.name, scalar=scalar, weak_type=is_weak and shape != ()
    )


@jax.jit
def make_weakly_typed(array: jax.Array) -> jax.Array:
    """Return a weakly typed copy; with a bfloat16 array, a strongly typed float32 one would promote to float32.

    JAX has no public conversion, but `jnp.full` of a Python number is weakly typed, and `.at[...].set` preserves that.
    An array whose dtype no Python number has is returned unchanged.
    """
    numbers: dict[str, complex] = {"f": 0.0, "i": 0, "c": 0j}
    weak = jnp.full(array.shape, numbers.get(array.dtype.kind, 0.0))
    return weak.at[...].set(array) if weak.dtype == array.dtype else array


_WRITABLE_DTYPES = frozenset(
    {"bool", "bfloat16", "float4_e2m1fn", "complex64", "complex128"}
    | {f"int{bits}" for bits in (2, 4, 8, 16, 32, 64)}
    | {f"uint{bits}" for bits in (8, 16, 32, 64)}
    | {f"float{bits}" for bits in (16, 32, 64)}
    | {f"float8_{form}" for form in ("e3m4", "e4m3b11fnuz", "e4m3fn", "e4m3fnuz", "e5m2", "e5m2fnuz", "e8m0fnu")}
)
"""Dtypes that TensorStore writes; for any other it fails in its own thread, without naming the leaf."""


def _get_key_implementation(key: Any) -> str:
    """Return the name of a key's implementation; also for an abstract key, whose dtype has only a tag of it."""
    if isinstance(key, jax.Array):
        return str(jax.random.key_impl(key))
    for name in ("threefry2x32", "rbg", "unsafe_rbg"):
        if get_key_dtype(name) == key.dtype:
            return name
    raise LeafError(
        what=f"an abstract key has the unknown dtype {key.dtype}.",
        why="only the implementations that come with JAX can be recognised by their dtype.",
        fix="pass a concrete state as the template.",
    )
