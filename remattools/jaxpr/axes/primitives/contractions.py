# SPDX-License-Identifier: Apache-2.0
"""Rules of primitives that multiply two operands and sum over axes of both: matrix products and convolutions."""

from collections.abc import Iterator, Mapping
from typing import Any

from ..factor import Factor, Piece
from ..rule import Rule, get_operand_shapes


def _find_dot(equation: Any) -> Iterator[Factor]:
    (contracting, batch) = equation.params["dimension_numbers"]
    yield from _find_product(equation, contracting, batch)


def _find_product(equation: Any, contracting: Any, batch: Any) -> Iterator[Factor]:
    """Yield batch axes, then the free axes of both sides, in their order in the result, and the summed ones."""
    left_shape, right_shape = get_operand_shapes(equation)
    result = 0
    for left, right in zip(*batch, strict=True):
        yield Factor((left, right), (result,))
        result += 1
    for axis in range(len(left_shape)):
        if axis not in (*contracting[0], *batch[0]):
            yield Factor((axis, None), (result,))
            result += 1
    for axis in range(len(right_shape)):
        if axis not in (*contracting[1], *batch[1]):
            yield Factor((None, axis), (result,))
            result += 1
    for left, right in zip(*contracting, strict=True):
        yield Factor((left, right), (None,), "sum")


def _find_ragged_dot(equation: Any) -> Iterator[Factor]:
    """Yield what is independent of the groups: free axes of the side that is not ragged, and the contraction."""
    numbers = equation.params["ragged_dot_dimension_numbers"]
    contracting, batch = numbers.dot_dimension_numbers
    (ragged,) = numbers.lhs_ragged_dimensions
    groups = set(numbers.rhs_group_dimensions)
    if batch[0] or len(equation.invars) != 3:
        return
    left_shape, right_shape, _ = get_operand_shapes(equation)
    # A ragged contraction gives one product for each group, so its result has the groups as its first axis.
    result = int(ragged in contracting[0])
    for axis in range(len(left_shape)):
        if axis not in contracting[0]:
            if axis != ragged:
                yield Factor((axis, None, None), (result,))
            result += 1
    for axis in range(len(right_shape)):
        if axis not in contracting[1] and axis not in groups:
            yield Factor((None, axis, None), (result,))
            result += 1
    for left, right in zip(*contracting, strict=True):
        if left != ragged:
            yield Factor((left, right, None), (None,), "sum")


def _find_convolution(equation: Any) -> Iterator[Factor]:
    """Yield batch, features, and groups of features; rows of a spatial axis need their neighbours."""
    params = equation.params
    numbers = params["dimension_numbers"]
    image, kernel, result = numbers.lhs_spec, numbers.rhs_spec, numbers.out_spec
    if params["batch_group_count"] != 1:
        return
    yield Factor((image[0], None), (result[0],))
    if params["feature_group_count"] == 1:
        yield Factor((None, kernel[0]), (result[1],))
        yield Factor((image[1], kernel[1]), (None,), "sum")
        return
    image_shape, kernel_shape = get_operand_shapes(equation)
    # A piece has to hold whole groups, so one of the axes has to have one row for each group.
    if min(image_shape[image[1]], kernel_shape[kernel[0]]) == params["feature_group_count"]:
        yield Factor((image[1], kernel[0]), (result[1],))


def _cut_groups(equation: Any, factor: Factor, piece: Piece) -> Mapping[str, Any]:
    groups, image = equation.params["feature_group_count"], equation.params["dimension_numbers"].lhs_spec
    is_cut = groups > 1 and factor.operands[0] == image[1]
    return {**equation.params, "feature_group_count": piece.measure(groups) if is_cut else groups}


RULES = {
    "conv_general_dilated": Rule(_find_convolution, adjust=_cut_groups),
    "dot_general": Rule(_find_dot),
    "ragged_dot_general": Rule(_find_ragged_dot),
}
