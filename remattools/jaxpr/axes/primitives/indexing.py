# SPDX-License-Identifier: Apache-2.0
"""Rules of gather and scatter: along axes of the indices, and along axes that no index selects from."""

from collections.abc import Iterator, Mapping
from typing import Any

from ..factor import Factor, Piece
from ..rule import Rule, get_operand_shapes, is_padded


def _find_gather(equation: Any) -> Iterator[Factor]:
    numbers = equation.params["dimension_numbers"]
    operand, indices = get_operand_shapes(equation)
    rank = len(equation.outvars[0].aval.shape)
    batch = [axis for axis in range(rank) if axis not in numbers.offset_dims]
    paired = dict(zip(numbers.start_indices_batching_dims, numbers.operand_batching_dims, strict=True))
    for axis in range(len(indices) - 1):  # the last axis holds the components of one index
        yield Factor((paired.get(axis), axis), (batch[axis],))
    inside = [
        axis
        for axis in range(len(operand))
        if axis not in numbers.collapsed_slice_dims and axis not in numbers.operand_batching_dims
    ]
    for axis, result in zip(inside, numbers.offset_dims, strict=True):
        if equation.params["slice_sizes"][axis] == operand[axis] and axis not in numbers.start_index_map:
            yield Factor((axis, None), (result,))


def _adjust_gather(equation: Any, factor: Factor, piece: Piece) -> Mapping[str, Any]:
    params, (source, indices) = dict(equation.params), factor.operands
    if indices is not None:
        if is_padded(piece):  # copies of the last row repeat its indices; JAX's gradient would rely on the promise
            params |= {"unique_indices": False, "indices_are_sorted": False}
        return params
    assert source is not None
    sizes = list(params["slice_sizes"])
    sizes[source] = piece.measure(sizes[source])
    return {**params, "slice_sizes": tuple(sizes)}


def _find_scatter(equation: Any) -> Iterator[Factor]:
    """Yield window axes that are updated whole, and batching axes; updates of other rows may meet in one element."""
    numbers = equation.params["dimension_numbers"]
    operand, _, updates = get_operand_shapes(equation)
    if equation.params.get("update_consts"):
        return
    batch = [axis for axis in range(len(updates)) if axis not in numbers.update_window_dims]
    pairs = zip(numbers.operand_batching_dims, numbers.scatter_indices_batching_dims, strict=True)
    for axis, index_axis in pairs:
        yield Factor((axis, index_axis, batch[index_axis]), (axis,))
    inside = [
        axis
        for axis in range(len(operand))
        if axis not in numbers.inserted_window_dims and axis not in numbers.operand_batching_dims
    ]
    for axis, update in zip(inside, numbers.update_window_dims, strict=True):
        if updates[update] == operand[axis] and axis not in numbers.scatter_dims_to_operand_dims:
            yield Factor((axis, None, update), (axis,))


RULES = {
    "gather": Rule(_find_gather, adjust=_adjust_gather),
    **{
        name: Rule(_find_scatter)
        for name in ("scatter", "scatter-add", "scatter-max", "scatter-min", "scatter-mul", "scatter-sub")
    },
}
