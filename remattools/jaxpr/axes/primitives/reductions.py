# SPDX-License-Identifier: Apache-2.0
"""Rules of primitives that combine the elements along some axes and leave the other axes alone.

Only sums are combined across pieces. Maxima and minima could be, but where elements are equal the gradient would be
divided otherwise.
"""

from collections.abc import Callable, Iterator
from typing import Any

from ..factor import Factor
from ..rule import Rule, get_operand_shapes, get_result_shapes


def _find_reduction(equation: Any) -> Iterator[Factor]:
    reduced = equation.params["axes"]
    kept = [axis for axis in range(len(equation.invars[0].aval.shape)) if axis not in reduced]
    for result, axis in enumerate(kept):
        yield Factor((axis,), (result,))


def _find_sum(equation: Any) -> Iterator[Factor]:
    yield from _find_reduction(equation)
    for axis in equation.params["axes"]:
        yield Factor((axis,), (None,), "sum")


def _find_generic_reduction(equation: Any) -> Iterator[Factor]:
    """Yield the kept axes of `jax.lax.reduce`, whose operands are some arrays and then as many initial values."""
    count = len(equation.outvars)
    kept = [axis for axis in range(len(equation.invars[0].aval.shape)) if axis not in equation.params["dimensions"]]
    for result, axis in enumerate(kept):
        yield Factor((axis,) * count + (None,) * count, (result,) * count)


def _find_unless(param: str) -> Callable[[Any], Iterator[Factor]]:
    """Return a function that yields all axes but the one along which elements are combined or ordered."""

    def find(equation: Any) -> Iterator[Factor]:
        rank = len(equation.invars[0].aval.shape)
        for axis in range(rank):
            if axis != equation.params[param] % rank:
                yield Factor((axis,) * len(equation.invars), (axis,) * len(equation.outvars))

    return find


def _find_windows(equation: Any) -> Iterator[Factor]:
    """Yield the axes along which a window holds one row, such as batch and channels of a pooling."""
    params, rank = equation.params, len(equation.invars[0].aval.shape)
    ones = (1,) * rank
    steps = [params[name] or ones for name in ("base_dilation", "window_dilation") if name in params]
    shapes = (params["window_dimensions"], params["window_strides"], *steps)
    operands = get_operand_shapes(equation)
    for axis in range(rank):
        if all(each[axis] == 1 for each in shapes) and tuple(params["padding"][axis]) == (0, 0):
            places = tuple(axis if shape else None for shape in operands)  # initial values are scalars
            yield Factor(places, (axis,) * len(get_result_shapes(equation)))


RULES = {
    **{
        name: Rule(_find_reduction)
        for name in ("argmax", "argmin", *(f"reduce_{kind}" for kind in ("and", "max", "min", "or", "prod", "xor")))
    },
    **{name: Rule(_find_unless("axis")) for name in ("cumlogsumexp", "cummax", "cummin", "cumprod", "cumsum", "top_k")},
    **{
        name: Rule(_find_windows)
        for name in (
            "reduce_window",
            "reduce_window_max",
            "reduce_window_min",
            "reduce_window_sum",
            "select_and_gather_add",
            "select_and_scatter_add",
        )
    },
    "approx_top_k": Rule(_find_unless("reduction_dimension")),
    "reduce": Rule(_find_generic_reduction),
    "reduce_sum": Rule(_find_sum),
    "sort": Rule(_find_unless("dimension")),
}
