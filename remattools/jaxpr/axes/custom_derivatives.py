# SPDX-License-Identifier: Apache-2.0
"""One piece of a function with a derivative of its own: again such a function, of the rows of a piece.

The number of the piece is an operand of the new function, because a rule runs after the trace around it has ended.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .custom_cuts import Pullback, Pushforward, Step, find_custom_cuts, is_inexact
from .factor import Factor, Piece
from .programs import FindFactors, RunPiece, run_cut


def run_custom_piece(
    equation: Any,
    factor: Factor,
    operands: Sequence[Any],
    piece: Piece,
    find_factors: FindFactors,
    run_piece: RunPiece,
) -> list[Any]:
    """Compute a piece of a custom_jvp or custom_vjp, which has a derivative of its own again.

    Args:
        equation: An equation of one of `PRIMITIVES`.
        factor: One of its factors.
        operands: Values of the operands, those that have the axis already cut.
        piece: Which rows are computed.
        find_factors: Returns the factors of the equations inside.
        run_piece: Computes a piece of an equation inside.
    """
    analysis = find_custom_cuts(equation, find_factors)[factor]

    def run(step: Step, index: Any, values: Sequence[Any]) -> list[Any]:
        return run_cut(step.program, step.cut, values, dataclasses.replace(piece, index=index), run_piece)

    def compute(index: Any, *values: Any) -> tuple[Any, ...]:
        return tuple(run(analysis.step, index, values))

    is_differentiable = [is_inexact(atom.aval) for atom in equation.invars]
    if isinstance(analysis.rule, Pushforward):
        function = _make_custom_jvp(compute, analysis.rule, is_differentiable, run)
    else:
        function = _make_custom_vjp(compute, analysis.rule, is_differentiable, run)
    return list(function(jnp.asarray(piece.index, jnp.int32), *operands))


def _make_custom_jvp(
    compute: Callable[..., Any], rule: Pushforward, is_differentiable: Sequence[bool], run: Callable[..., list[Any]]
) -> Callable[..., Any]:
    function = jax.custom_jvp(compute)

    @function.defjvp
    def push_forward(primals: Any, tangents: Any) -> Any:
        (index, *values), dots = primals, tangents[1:]
        known = [dot for dot, use in zip(dots, is_differentiable, strict=True) if use]
        results = run(rule.step, index, [*values, *known])
        count = len(rule.is_zero)
        computed = iter(results[count:])
        pushed = [
            _make_zero_tangent(value) if is_zero else next(computed)
            for value, is_zero in zip(results[:count], rule.is_zero, strict=True)
        ]
        return tuple(results[:count]), tuple(pushed)

    return function


def _make_zero_tangent(value: Any) -> Any:
    return jnp.zeros_like(value) if is_inexact(value) else np.zeros(value.shape, jax.dtypes.float0)


def _make_custom_vjp(
    compute: Callable[..., Any], rule: Pullback, is_differentiable: Sequence[bool], run: Callable[..., list[Any]]
) -> Callable[..., Any]:
    function = jax.custom_vjp(compute)

    def forward(index: Any, *values: Any) -> Any:
        results = run(rule.forward, index, values)
        computed = iter(results[: rule.residuals.count(None)])
        residuals = [next(computed) if number is None else values[number] for number in rule.residuals]
        return tuple(results[rule.residuals.count(None) :]), (index, residuals)

    def backward(saved: Any, cotangents: Any) -> Any:
        index, residuals = saved
        computed = iter(run(rule.backward, index, [*residuals, *cotangents]))
        return (None, *(next(computed) if has else None for has in rule.has_cotangent))

    function.defvjp(forward, backward)
    return function
