# SPDX-License-Identifier: Apache-2.0
"""Apply surgery to arrays on the host: casts that lose no value, blocks, permuted axes, joins."""

import dataclasses
import warnings
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..errors import StructureError
from ..spec.operations import Cast, Join, Operation, Pad, Slice, Stack, as_code
from ..tree.leaves import is_key
from ..tree.records import Record, get_host_shape, parse_dtype
from .resize import Shape, compute_resized_shape, locate_block, needs_slice

type Array = np.ndarray[Any, Any]


@dataclasses.dataclass(frozen=True)
class TakeStep:
    """Take one position along an axis, which then disappears, or a range.

    Attributes:
        axis: The axis; not negative.
        at: The position or the range.
    """

    axis: int
    at: int | slice


@dataclasses.dataclass(frozen=True)
class PermuteStep:
    """Permute the axes.

    Attributes:
        axes: The axes in their new order.
    """

    axes: tuple[int, ...]


ArrayStep = TakeStep | PermuteStep
"""One step on one array, with its axes resolved. The data of keys has one more axis at the end."""


def apply_step(step: ArrayStep, array: Array) -> Array:
    """Return an array after one step; the result may share its memory."""
    if isinstance(step, TakeStep):
        return np.asarray(array[(*(slice(None) for _ in range(step.axis)), step.at)])
    return array.transpose(*step.axes, *range(len(step.axes), array.ndim))


def join_arrays(operation: Join, axis: int, arrays: Sequence[Array]) -> Array:
    """Return the array that a `Stack` or `Merge` makes from several.

    Args:
        operation: The operation.
        axis: Its axis; not negative.
        arrays: The arrays, in order.
    """
    if isinstance(operation, Stack):
        return np.stack(arrays, axis)
    if not operation.interleaved:
        return np.concatenate(arrays, axis)
    stacked = np.stack(arrays, axis + 1)
    return stacked.reshape(*stacked.shape[:axis], -1, *stacked.shape[axis + 2 :])


def apply(
    name: str, operations: Sequence[Operation], record: Record, array: Array | None, target: Record, template: Any
) -> Array:
    """Return an array with its casts and resizing applied.

    Args:
        name: Name of the leaf, for errors.
        operations: All operations on this leaf.
        record: The leaf on disk.
        array: Its values; None for an empty array.
        target: Record with the shape and dtype that the result must have.
        template: The value in the state; only read by `Pad(fill="template")`.

    Raises:
        StructureError: If the new dtype cannot hold a value, or the state has no values to fill with.
    """
    found = np.zeros(*get_host_shape(record)) if array is None else array
    target_shape = get_host_shape(target)[0]  # The data of keys has one more axis, which no operation changes.
    for operation in operations:
        if isinstance(operation, Cast):
            found = cast(name, operation, found)
    if len(found.shape) != len(target_shape):
        return found
    # Slices come first, so that the padded array has its final shape. The two never change the same axis.
    for operation in operations:
        if isinstance(operation, Slice) and needs_slice(found.shape, target_shape):
            resized = compute_resized_shape(operation, found.shape, target_shape)
            found = found[locate_block(operation, found.shape, resized)]
    for operation in operations:
        if isinstance(operation, Pad) and found.shape != target_shape:
            # Keys that are all one number would draw the same values: whatever `fill` is, they come from the state.
            padding = Pad(operation.pattern, start=operation.start) if target.kind == "key" else operation
            padded = _make_filled_array(name, padding, target_shape, found.dtype, template)
            padded[locate_block(operation, found.shape, target_shape)] = found
            found = padded
    return np.ascontiguousarray(found) if found.ndim else found


def _make_filled_array(name: str, operation: Pad, shape: Shape, dtype: np.dtype[Any], template: Any) -> Array:
    if operation.fill != "template":
        return np.full(shape, _make_fill_value(name, operation, dtype), dtype)
    return require_values(name, template, as_code(operation)).astype(dtype)


def require_values(name: str, template: Any, code: str) -> Array:
    """Return the values in the state.

    Args:
        name: Name of the leaf, for errors.
        template: The value in the state.
        code: The operation as code, for errors.

    Raises:
        StructureError: If the state is abstract, or sharded across processes.
    """
    if isinstance(template, jax.ShapeDtypeStruct):
        raise StructureError(
            what=f"{code} keeps values of {name}, but the state passed in is abstract there.",
            why="a shape has no values, and training from zeros instead would silently be worse.",
            fix="pass an initialised model, or ct.Pad(..., fill=0.0).",
        )
    if isinstance(template, jax.Array) and not template.is_fully_addressable:
        raise StructureError(
            what=f"{code} on {name}: the array is sharded across several processes.",
            why="this process cannot read the values that would be kept.",
            fix="ct.Pad(..., fill=0.0), or apply the surgery in a single process first.",
        )
    return np.asarray(jax.random.key_data(template) if is_key(template) else template)


def _make_fill_value(name: str, operation: Pad, dtype: np.dtype[Any]) -> Array:
    """Return the number to fill with; raises `StructureError` if the dtype cannot hold it."""
    given = np.asarray(operation.fill)
    with np.errstate(all="ignore"):
        value = given.astype(dtype)
        whole = _is_integer(dtype) and not np.array_equal(value.astype(given.dtype), given)
        if whole or (np.isfinite(given) and not np.isfinite(value)):
            raise StructureError(
                what=f"{as_code(operation)} on {name}: {dtype} cannot hold {operation.fill!r}.",
                why=f"the new values would be {value}.",
                fix='a number of that dtype, or fill="template" to keep the values in the state.',
            )
    return value


def _is_integer(dtype: np.dtype[Any]) -> bool:
    return dtype.kind == "b" or jnp.issubdtype(dtype, jnp.integer)


def cast(name: str, operation: Cast, array: Array) -> Array:
    """Return an array after a cast; unchanged if its dtype is not `from_dtype`.

    Raises:
        StructureError: If the new dtype cannot hold a value.
    """
    if array.dtype != parse_dtype(operation.from_dtype):
        return array
    dtype = parse_dtype(operation.to_dtype)
    with np.errstate(all="ignore"), warnings.catch_warnings():
        # A lost imaginary part raises below, with more detail.
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
            fix=f'ct.Reinit("{name}"), or give the model a dtype that holds the value.',
        )
    return np.asarray(new)
