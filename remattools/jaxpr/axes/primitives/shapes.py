# SPDX-License-Identifier: Apache-2.0
"""Rules of primitives that move elements and compute nothing: reshapes, slices, concatenations."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..factor import Factor, Piece
from ..rule import Rule, get_operand_shapes, get_result_shapes, make_map


def _cut_length(lengths: Sequence[int], axis: int, piece: Piece) -> tuple[int, ...]:
    return (*lengths[:axis], piece.measure(lengths[axis]), *lengths[axis + 1 :])


def _cut_param(name: str) -> Any:
    """Return a function that shortens a shape among the parameters along the axis of the only result."""

    def adjust(equation: Any, factor: Factor, piece: Piece) -> Mapping[str, Any]:
        (axis,) = factor.results
        assert axis is not None
        return {**equation.params, name: _cut_length(equation.params[name], axis, piece)}

    return adjust


def _find_broadcast(equation: Any) -> Iterator[Factor]:
    if len(equation.invars) != 1:  # sizes that are not known while tracing
        return
    (shape,) = get_operand_shapes(equation)
    sources = {result: operand for operand, result in enumerate(equation.params["broadcast_dimensions"])}
    for axis, length in enumerate(equation.params["shape"]):
        source = sources.get(axis)
        yield Factor((source if source is not None and shape[source] == length else None,), (axis,))


def _find_reshape(equation: Any) -> Iterator[Factor]:
    if equation.params["dimensions"] is not None or len(equation.invars) != 1:
        return
    (before,), (after,) = get_operand_shapes(equation), get_result_shapes(equation)
    for operand, result in _pair_leading_axes(before, after):
        short, long = sorted((before[operand], after[result]))
        if long % short == 0:
            yield Factor((operand,), (result,))


def _pair_leading_axes(before: Sequence[int], after: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield the first axes of the smallest groups of consecutive axes that have as many elements before as after.

    Rows of a group's first axis are consecutive in memory on both sides, so they are the same elements. An axis that
    survives is a group of its own.
    """
    if math.prod(before) == 0:
        return
    left = [axis for axis, length in enumerate(before) if length != 1]
    right = [axis for axis, length in enumerate(after) if length != 1]
    while left and right:
        first = left.pop(0), right.pop(0)
        sizes = [before[first[0]], after[first[1]]]
        while sizes[0] != sizes[1]:
            if sizes[0] < sizes[1]:
                sizes[0] *= before[left.pop(0)]
            else:
                sizes[1] *= after[right.pop(0)]
        yield first


def _find_transpose(equation: Any) -> Iterator[Factor]:
    for result, operand in enumerate(equation.params["permutation"]):
        yield Factor((operand,), (result,))


def _find_squeeze(equation: Any) -> Iterator[Factor]:
    rank = len(equation.invars[0].aval.shape)
    removed = {axis % rank for axis in equation.params["dimensions"]}
    for result, operand in enumerate(axis for axis in range(rank) if axis not in removed):
        yield Factor((operand,), (result,))


def _find_slice(equation: Any) -> Iterator[Factor]:
    (before,), (after,) = get_operand_shapes(equation), get_result_shapes(equation)
    strides = equation.params["strides"] or (1,) * len(before)
    for axis, stride in enumerate(strides):
        if before[axis] == after[axis] and stride == 1:
            yield Factor((axis,), (axis,))


def _find_pad(equation: Any) -> Iterator[Factor]:
    for axis, (low, high, interior) in enumerate(equation.params["padding_config"]):
        if low == high == interior == 0:
            yield make_map(equation, axis, axis)


def _find_dynamic_slice(equation: Any) -> Iterator[Factor]:
    # A slice as long as its axis starts at 0, wherever it was asked to start.
    before, after = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
    for axis in range(len(before)):
        if before[axis] == after[axis]:
            yield make_map(equation, axis, axis)


def _find_dynamic_update_slice(equation: Any) -> Iterator[Factor]:
    operand, update, *starts = get_operand_shapes(equation)
    for axis in range(len(operand)):
        if operand[axis] == update[axis]:
            yield Factor((axis, axis, *[None] * len(starts)), (axis,))


def _find_other_axes(equation: Any) -> Iterator[Factor]:
    """Yield all axes but those along which elements move from row to row."""
    params, rank = equation.params, len(equation.invars[0].aval.shape)
    moved = params["dimensions"] if "dimensions" in params else (params.get("dimension", params.get("axis")),)
    for axis in range(rank):
        if axis not in moved:
            yield Factor((axis,) * len(equation.invars), (axis,) * len(equation.outvars))


def _find_tile(equation: Any) -> Iterator[Factor]:
    for axis, repetitions in enumerate(equation.params["reps"]):
        if repetitions == 1:
            yield Factor((axis,), (axis,))


def _find_stack(equation: Any) -> Iterator[Factor]:
    """Yield all axes but the one that `jnp.stack` adds or `jnp.unstack` removes."""
    several, one = equation.invars, equation.outvars
    if equation.primitive.name == "unstack":
        several, one = one, several
    rank = len(one[0].aval.shape)
    for place, axis in enumerate(axis for axis in range(rank) if axis != equation.params["axis"] % rank):
        inside, around = (place,) * len(several), (axis,)
        yield Factor(inside, around) if several is equation.invars else Factor(around, inside)


def _find_empty(equation: Any) -> Iterator[Factor]:
    for axis in range(len(equation.params["shape"])):
        yield Factor((), (axis,))


RULES = {
    "broadcast_in_dim": Rule(_find_broadcast, adjust=_cut_param("shape")),
    "concatenate": Rule(_find_other_axes),
    "dynamic_slice": Rule(_find_dynamic_slice, adjust=_cut_param("slice_sizes")),
    "dynamic_update_slice": Rule(_find_dynamic_update_slice),
    "empty": Rule(_find_empty, adjust=_cut_param("shape")),
    "pad": Rule(_find_pad),
    "reshape": Rule(_find_reshape, adjust=_cut_param("new_sizes")),
    "rev": Rule(_find_other_axes),
    "slice": Rule(_find_slice, adjust=_cut_param("limit_indices")),
    "split": Rule(_find_other_axes),
    "squeeze": Rule(_find_squeeze),
    "stack": Rule(_find_stack),
    "tile": Rule(_find_tile),
    "transpose": Rule(_find_transpose),
    "unstack": Rule(_find_stack),
}
