# SPDX-License-Identifier: Apache-2.0
"""An axis goes through a whole program, or there is no cut."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from remattools.jaxpr.axes.factor import Piece
from remattools.jaxpr.axes.pieces import run_piece
from remattools.jaxpr.axes.programs import find_cut, flatten_program, run_cut
from remattools.jaxpr.axes.rules import find_factors

from .cutting import compare, cut_rows, draw, list_rows, make_like
from .drawing import draw_program


def _flatten(function, *arguments):
    return flatten_program(jax.make_jaxpr(function)(*arguments))


def _cut(function, *arguments, result=0):
    program = _flatten(function, *arguments)
    return program, find_cut(program, {program.outputs[0]: result}, find_factors)


def test_jits_are_inlined_with_their_names_and_constants():
    table = np.arange(4.0)

    @jax.jit
    def inner(x):
        with jax.named_scope("inside"):
            return jnp.sin(x) * table

    with jax.named_scope("outside"):
        program = _flatten(lambda x: jax.named_scope("outside")(inner)(inner(x)), draw((4,)))
    assert [equation.primitive.name for equation in program.equations] == ["sin", "mul", "sin", "mul"]
    assert str(program.equations[2].source_info.name_stack).endswith("outside/inside")
    assert len({var for equation in program.equations for var in equation.outvars}) == 4


def test_results_of_jits_in_jits_are_read_by_what_follows():
    inner = jax.jit(lambda x: (jnp.sin(x), x))
    outer = jax.jit(lambda x: inner(x)[0] * 2 + inner(inner(x)[1])[0])
    program = _flatten(lambda x: outer(outer(x)), draw((4,)))
    cut = find_cut(program, {program.outputs[0]: 0}, find_factors)
    (rows,) = run_cut(program, cut, [draw((4,))[2:]], Piece(1, 2, 4), run_piece)
    np.testing.assert_allclose(rows, outer(outer(draw((4,))))[2:], rtol=1e-12)


def test_the_axis_reaches_arguments_and_leaves_the_others_whole():
    program, cut = _cut(lambda x, w: jnp.tanh(x @ w) + 1, draw((6, 3)), draw((3, 4)))
    assert [cut.get_place(var) for var in program.inputs] == [0, None]
    x, w = draw((6, 3)), draw((3, 4))
    (rows,) = run_cut(program, cut, [x[2:4], w], Piece(1, 2, 6), run_piece)
    np.testing.assert_allclose(rows, jnp.tanh(x @ w)[2:4] + 1, rtol=1e-12)


@pytest.mark.parametrize(
    "function",
    [
        pytest.param(lambda x: x - x.mean(0), id="mean-over-rows"),
        pytest.param(lambda x: x @ x.T, id="one-value-cut-and-whole"),
        pytest.param(lambda x: x + x.T, id="one-value-cut-along-two-axes"),
        pytest.param(lambda x: jax.lax.fori_loop(0, 3, lambda _, y: jnp.sin(y), x), id="no-rule"),
        pytest.param(lambda x: x * np.ones((4, 4)), id="constant-with-the-axis"),
    ],
)
def test_programs_that_mix_rows_have_no_cut(function):
    assert _cut(function, draw((4, 4)))[1] is None


def _add_rows(function):
    """Return the program of a function of rows and weights, cut along the rows, and the place of its result."""
    program = _flatten(function, draw((6, 4)), draw((3,)))
    cut = find_cut(program, {program.inputs[0]: 0}, find_factors)
    return program, cut, None if cut is None else cut.get_place(program.outputs[0])


@pytest.mark.parametrize(
    ("function", "is_sum"),
    [
        pytest.param(lambda x, w: x.sum(0), True, id="sum"),
        pytest.param(lambda x, w: -(x.T @ x).T.reshape(2, 8).astype(jnp.float32), True, id="moved-and-cast"),
        pytest.param(lambda x, w: x.sum(0) + (2 * x).sum(0), True, id="two-sums"),
        pytest.param(lambda x, w: x.sum(0)[None] * w[:, None], True, id="times-a-whole-value"),
        pytest.param(lambda x, w: x.sum(0) + 1, False, id="plus-a-whole-value"),
        pytest.param(lambda x, w: x.sum(0) ** 2, False, id="square"),
        pytest.param(lambda x, w: x.sum(0) * x.sum(0), False, id="product-of-sums"),
        pytest.param(lambda x, w: 1 / x.sum(0), False, id="inverse"),
        pytest.param(lambda x, w: jnp.sin(x.sum(0)), False, id="nonlinear"),
        pytest.param(lambda x, w: x * x.sum(0), False, id="rows-times-their-sum"),
        pytest.param(lambda x, w: x.sum(0).astype(jnp.int32), False, id="rounded"),
    ],
)
def test_what_is_linear_in_a_sum_can_be_added_later(function, is_sum):
    program, cut, place = _add_rows(function)
    assert (place == "sum") is is_sum
    if is_sum:
        x, w = draw((6, 4)), draw((3,))
        parts = [run_cut(program, cut, [x[2 * i : 2 * i + 2], w], Piece(i, 2, 6), run_piece)[0] for i in range(3)]
        np.testing.assert_allclose(sum(parts), function(x, w), rtol=1e-6)


def _find_pieces(seed):
    """Return for each axis that goes through a random program a function that computes its last result in pieces."""
    function, inputs = draw_program(seed)
    program = _flatten(function, *inputs)
    last = program.outputs[-1]
    found = []
    for axis, size in enumerate(last.aval.shape):
        cut = find_cut(program, {last: axis}, find_factors)
        if cut is not None and size > 2:
            places = [cut.get_place(var) for var in program.inputs]
            shortest = min(var.aval.shape[place] for var, place in cut.places.items() if isinstance(place, int))
            found.append(functools.partial(_run_pieces, program, cut, places, axis, shortest))
    return function, inputs, found


def _run_pieces(program, cut, places, axis, size, *inputs):
    rows = list_rows(size)[-1]
    parts = []
    for index in range(-(-size // rows)):
        piece = Piece(index, rows, size)
        values = [x if place is None else cut_rows(x, place, piece) for x, place in zip(inputs, places)]
        parts.append(run_cut(program, cut, values, Piece(jnp.int32(index), rows, size), run_piece)[-1])
    return jax.lax.slice_in_dim(jnp.concatenate(parts, axis), 0, program.outputs[-1].aval.shape[axis], axis=axis)


def test_axes_go_through_random_programs():
    count = 0
    for seed in range(20):
        function, inputs, found = _find_pieces(seed)
        for pieces in found[:1]:
            expected, pull = jax.vjp(lambda *args, f=function: f(*args)[-1], *inputs)
            actual, pull_pieces = jax.vjp(jax.jit(pieces), *inputs)
            if jnp.issubdtype(expected.dtype, jnp.inexact):
                cotangent = make_like(expected, seed)
                compare([expected, *pull(cotangent)], [actual, *pull_pieces(cotangent)], f"program {seed}")
                count += 1
    assert count > 3
