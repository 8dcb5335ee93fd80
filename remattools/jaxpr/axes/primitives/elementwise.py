# SPDX-License-Identifier: Apache-2.0
"""Rules of primitives that compute each element of their results from the same element of each operand."""

from collections.abc import Iterator
from typing import Any

from ..factor import Factor
from ..rule import Rule, get_operand_shapes, get_result_shapes

_ELEMENTWISE = (
    "abs",
    "acos",
    "acosh",
    "add",
    "add_any",
    "and",
    "asin",
    "asinh",
    "atan",
    "atan2",
    "atanh",
    "bessel_i0e",
    "bessel_i1e",
    "cbrt",
    "ceil",
    "clamp",
    "clz",
    "complex",
    "conj",
    "convert_element_type",
    "copy",
    "copy_p",
    "cos",
    "cosh",
    "digamma",
    "div",
    "eq",
    "eq_to",
    "erf",
    "erf_inv",
    "erfc",
    "exp",
    "exp2",
    "expm1",
    "floor",
    "ge",
    "gt",
    "igamma",
    "igamma_grad_a",
    "igammac",
    "imag",
    "integer_pow",
    "is_finite",
    "le",
    "le_to",
    "lgamma",
    "log",
    "log1p",
    "log2",
    "logistic",
    "lt",
    "lt_to",
    "max",
    "min",
    "mul",
    "mulhi",
    "name",
    "ne",
    "neg",
    "nextafter",
    "not",
    "one_minus_square",
    "or",
    "polygamma",
    "polynomial",
    "population_count",
    "pow",
    "pvary",
    "real",
    "reduce_precision",
    "regularized_incomplete_beta",
    "rem",
    "round",
    "rsqrt",
    "select_n",
    "shift_left",
    "shift_right_arithmetic",
    "shift_right_logical",
    "sign",
    "sin",
    "sinh",
    "sqrt",
    "square",
    "stop_gradient",
    "sub",
    "tan",
    "tanh",
    "threefry2x32",
    "xor",
    "zeta",
)


def _find_elementwise(equation: Any) -> Iterator[Factor]:
    """Yield a factor for each axis; an operand of size 1 against more is the same for all rows, so it is whole."""
    shapes, (result, *others) = get_operand_shapes(equation), get_result_shapes(equation)
    if any(other != result for other in others) or any(len(shape) not in (0, len(result)) for shape in shapes):
        return
    for axis, length in enumerate(result):
        operands = tuple(axis if shape and shape[axis] == length else None for shape in shapes)
        yield Factor(operands, (axis,) * (1 + len(others)))


def _find_bitcast(equation: Any) -> Iterator[Factor]:
    """Yield the axes that both sides have: between dtypes of different width, one side has another axis at the end."""
    ranks = len(equation.invars[0].aval.shape), len(equation.outvars[0].aval.shape)
    for axis in range(min(ranks)):
        yield Factor((axis,), (axis,))


def _find_barrier(equation: Any) -> Iterator[Factor]:
    """Yield the axes of a barrier's operands if all have the same shape: the barrier holds them back together."""
    shapes = get_operand_shapes(equation)
    if len(set(shapes)) == 1:
        yield from _find_elementwise(equation)


def _find_constraint(equation: Any) -> Iterator[Factor]:
    """Yield the axes that a sharding constraint leaves whole on each device."""
    spec = getattr(equation.params["sharding"], "spec", None)
    if spec is None or equation.params.get("layout") is not None:
        return
    for axis in range(len(equation.outvars[0].aval.shape)):
        if axis >= len(spec) or spec[axis] is None:
            yield Factor((axis,), (axis,))


RULES = {name: Rule(_find_elementwise) for name in _ELEMENTWISE} | {
    "bitcast_convert_type": Rule(_find_bitcast),
    "optimization_barrier": Rule(_find_barrier),
    "sharding_constraint": Rule(_find_constraint),
}
