# SPDX-License-Identifier: Apache-2.0
"""What surgery does to one array on the host: casts that lose nothing unsaid, blocks cut out or put in."""

import operator
import warnings
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..errors import StructureError
from ..spec.operations import Cast, Operation, Pad, Slice, as_code
from ..tree.records import Record, get_host_shape, parse_dtype

type Array = np.ndarray[Any, Any]
type Shape = tuple[int, ...]


def compute_shape(name: str, operations: Sequence[Operation], shape: Shape, target_shape: Shape) -> Shape:
    """The shape that an array has after the resizing among `operations`.

    Args:
        name: Name of the leaf, for errors.
        operations: All operations on this leaf.
        shape: Shape on disk.
        target_shape: Shape in the state; of another rank, nothing is done.

    Raises:
        StructureError: If a block would not lie inside its array.
    """
    for operation in operations:
        if isinstance(operation, Pad | Slice) and len(shape) == len(target_shape):
            bend = max if isinstance(operation, Pad) else min
            after = tuple(map(bend, shape, target_shape))
            small, large = (shape, after) if isinstance(operation, Pad) else (after, shape)
            start = _get_start(operation, len(shape))
            beyond = [axis for axis in range(len(shape)) if start[axis] + small[axis] > large[axis]]
            if after != shape and (beyond or len(operation.start) > len(shape)):
                raise StructureError(
                    what=f"{as_code(operation)} on {name}: a block of {small} at {start} leaves an array of {large}.",
                    why="every value of the block has to stand in the larger array.",
                    fix=f"start={tuple(max(0, big - little) for big, little in zip(large, small))} is the last place.",
                )
            shape = after
    return shape


def apply(
    name: str, operations: Sequence[Operation], record: Record, array: Array | None, target: Record, template: Any
) -> Array:
    """An array as the state wants it.

    Args:
        name: Name of the leaf, for errors.
        operations: All operations on this leaf.
        record: The leaf on disk.
        array: Its values; None if it has none.
        target: The leaf as it shall be.
        template: The value of the state, asked only by `Pad(fill="template")`.

    Raises:
        StructureError: If a value cannot be held by the new dtype.
    """
    found = np.zeros(*get_host_shape(record)) if array is None else array
    for operation in operations:
        if isinstance(operation, Cast) and found.dtype == parse_dtype(operation.from_dtype):
            found = _cast(name, operation, found)
    if len(found.shape) != len(target.shape):
        return found
    # Blocks are cut out first, so that what is padded has its final shape. The axes of the two are never the same.
    for operation in operations:
        if isinstance(operation, Slice) and any(map(operator.gt, found.shape, target.shape)):
            sizes = map(min, found.shape, target.shape)
            found = found[tuple(slice(at, at + size) for at, size in zip(_get_start(operation, found.ndim), sizes))]
    for operation in operations:
        if isinstance(operation, Pad) and found.shape != target.shape:
            block = tuple(slice(at, at + size) for at, size in zip(_get_start(operation, found.ndim), found.shape))
            padded = _make_filled_array(name, operation, target.shape, found.dtype, template)
            padded[block] = found
            found = padded
    return np.ascontiguousarray(found) if found.ndim else found


def _get_start(operation: Operation, rank: int) -> Shape:
    given = operation.start if isinstance(operation, Pad | Slice) else ()
    return (*given, *(0 for _ in range(rank - len(given))))[:rank]


def _make_filled_array(name: str, operation: Pad, shape: Shape, dtype: np.dtype[Any], template: Any) -> Array:
    if operation.fill != "template":
        return np.full(shape, _make_fill_value(name, operation, dtype), dtype)
    return require_values(name, template, as_code(operation)).astype(dtype)


def require_values(name: str, template: Any, code: str) -> Array:
    """The values that the state has; raises `StructureError` if it is abstract or spread over processes."""
    if isinstance(template, jax.ShapeDtypeStruct):
        raise StructureError(
            what=f"{code} keeps values of {name}, and the state passed in has none there: it is abstract.",
            why="a shape has no values, and zeros nobody asked for would train silently worse.",
            fix="pass an initialised model, or ct.Pad(..., fill=0.0).",
        )
    if isinstance(template, jax.Array) and not template.is_fully_addressable:
        raise StructureError(
            what=f"{code} on {name}: the array is spread over several processes.",
            why="this process cannot see the values that would be kept.",
            fix="a fill that is a number, or surgery in one process first.",
        )
    return np.asarray(template)


def _make_fill_value(name: str, operation: Pad, dtype: np.dtype[Any]) -> Array:
    """The number to fill with; raises `StructureError` if the array cannot hold it."""
    given = np.asarray(operation.fill)
    with np.errstate(all="ignore"):
        value = given.astype(dtype)
        whole = _is_integer(dtype) and not np.array_equal(value.astype(given.dtype), given)
        if whole or (np.isfinite(given) and not np.isfinite(value)):
            raise StructureError(
                what=f"{as_code(operation)} on {name}: {dtype} cannot hold {operation.fill!r}.",
                why=f"the new values would be {value}.",
                fix='a number of that dtype, or fill="template" for what the state has there.',
            )
    return value


def _is_integer(dtype: np.dtype[Any]) -> bool:
    return dtype.kind == "b" or jnp.issubdtype(dtype, jnp.integer)


def _cast(name: str, operation: Cast, array: Array) -> Array:
    dtype = parse_dtype(operation.to_dtype)
    with np.errstate(all="ignore"), warnings.catch_warnings():
        # Of an imaginary part that is lost more is said below.
        warnings.simplefilter("ignore", np.exceptions.ComplexWarning)
        new = array.astype(dtype)
        if _is_integer(dtype) or _is_integer(array.dtype) or (array.dtype.kind == "c" and dtype.kind != "c"):
            lost = new.astype(array.dtype) != array
        else:
            lost = np.isfinite(array) & ~np.isfinite(new)
    if lost.any():
        where = tuple(int(axis) for axis in np.argwhere(lost)[0])
        raise StructureError(
            what=f"{as_code(operation)} on {name}: {array[where]} at {list(where)} would become {new[where]}.",
            why=f"{operation.to_dtype} cannot hold {int(lost.sum())} of its {lost.size} value(s).",
            fix=f'ct.Reinit("{name}"), or the dtype it has in the model.',
        )
    return np.asarray(new)
