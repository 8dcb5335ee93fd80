# SPDX-License-Identifier: Apache-2.0
"""Computes one piece of an equation along a factor."""

from collections.abc import Sequence
from typing import Any

from ... import compat
from .custom_cuts import PRIMITIVES
from .custom_derivatives import run_custom_piece
from .factor import Factor, Piece
from .rule import is_padded, mask_rows
from .rules import RULES, find_factors


def run_piece(equation: Any, factor: Factor, operands: Sequence[Any], piece: Piece) -> list[Any]:
    """Compute one piece of an equation under the current trace.

    Names, source lines and compute type of the equation are those of what is computed.

    Args:
        equation: An equation of a jaxpr.
        factor: One of its `rules.find_factors`.
        operands: Values of the operands, those that have the axis already cut; literals as their values.
        piece: Which rows are computed.

    Returns:
        The rows of the results that belong to the piece, or, for kind "sum", what the piece adds to the results. In a
        sum rows beyond the end count as zero.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from remattools.jaxpr.axes.rules import find_factors
        >>> equation = jax.make_jaxpr(jnp.sin)(jnp.ones(6)).eqns[0]
        >>> (factor,) = find_factors(equation)
        >>> run_piece(equation, factor, [jnp.zeros(2)], Piece(index=1, rows=2, size=6))
        [Array([0., 0.], dtype=float32)]
    """
    if equation.primitive.name in PRIMITIVES:
        with compat.enter_equation(equation):
            return run_custom_piece(equation, factor, operands, piece, find_factors, run_piece)
    rule = RULES[equation.primitive.name]
    if factor.kind == "sum" and is_padded(piece):
        operands = _mask_operands(equation, factor, operands, piece)
    if rule.compute is not None:
        with compat.enter_equation(equation):
            return list(rule.compute(equation, factor, operands, piece))
    params = equation.params if rule.adjust is None else rule.adjust(equation, factor, piece)
    return compat.bind(equation, operands, params)


def _mask_operands(equation: Any, factor: Factor, operands: Sequence[Any], piece: Piece) -> list[Any]:
    # All operands of a product, because zero times an infinite copy would not be zero.
    with compat.enter_equation(equation):
        return [
            value if axis is None else mask_rows(value, axis, piece, atom.aval.shape[axis])
            for value, axis, atom in zip(operands, factor.operands, equation.invars, strict=True)
        ]
