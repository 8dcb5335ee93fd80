# SPDX-License-Identifier: Apache-2.0
"""Gathers and scatters are cut along axes of indices and along axes that no index selects from."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from ..cutting import check, draw, find_equation, find_factors, run_in_pieces


def _indices(*shape):
    return (np.arange(math.prod(shape)) * 7 % 5).reshape(shape)


@pytest.mark.parametrize(
    ("function", "shape", "expected"),
    [
        pytest.param(
            lambda x: jnp.take(x, _indices(2, 3), axis=0), (5, 4), [". 0 -> 0", ". 1 -> 1", "1 . -> 2"], id="embedding"
        ),
        pytest.param(
            lambda x: jnp.take_along_axis(x, _indices(4, 6, 2), axis=2),
            (4, 6, 5),
            ["0 0 -> 0", "1 1 -> 1", ". 2 -> 2"],
            id="along-axis",
        ),
        pytest.param(
            lambda x: x.at[_indices(6)].get(indices_are_sorted=True, mode="fill", fill_value=3),
            (4, 2),
            [". 0 -> 0", "1 . -> 1"],
            id="filled",
        ),
        pytest.param(lambda x: jnp.take(x, jnp.int32(2), axis=1), (4, 6), ["0 . -> 0"], id="one-column"),
    ],
)
def test_gathers(function, shape, expected):
    check(function, draw(shape), name="gather", expected=expected)


def test_rows_beyond_the_end_do_not_break_a_promise_of_unique_indices():
    def take(x):
        return x.at[jnp.array([3, 1, 2])].get(unique_indices=True, mode="promise_in_bounds")

    equation, operands = find_equation(take, draw((5, 2)), name="gather")
    factor = find_factors(equation)[0]
    program = jax.make_jaxpr(lambda operands: run_in_pieces(equation, factor, operands, 2))(operands)
    gathers = [each for each in program.eqns if each.primitive.name == "gather"]
    assert [each.params["unique_indices"] for each in gathers] == [False, False]
    program = jax.make_jaxpr(lambda operands: run_in_pieces(equation, factor, operands, 1))(operands)
    assert all(each.params["unique_indices"] for each in program.eqns if each.primitive.name == "gather"), "control"


def _scatter_batches(x, u):
    numbers = lax.ScatterDimensionNumbers(
        update_window_dims=(2,),
        inserted_window_dims=(1,),
        scatter_dims_to_operand_dims=(1,),
        operand_batching_dims=(0,),
        scatter_indices_batching_dims=(0,),
    )
    return lax.scatter_add(x, _indices(4, 3)[..., None], u, numbers)


@pytest.mark.parametrize(
    ("name", "function", "shapes", "expected"),
    [
        pytest.param("scatter-add", lambda x, u: x.at[_indices(3)].add(u), [(6, 4), (3, 4)], ["1 . 1 -> 1"], id="add"),
        pytest.param("scatter", lambda x, u: x.at[:, 1].set(u), [(6, 4), (6,)], ["0 . 0 -> 0"], id="set"),
        pytest.param("scatter-max", lambda x, u: x.at[_indices(3)].max(u), [(6, 4), (3, 4)], ["1 . 1 -> 1"], id="max"),
        pytest.param(
            "scatter-add", _scatter_batches, [(4, 5, 6), (4, 3, 6)], ["0 0 0 -> 0", "2 . 2 -> 2"], id="batches"
        ),
    ],
)
def test_scatters(name, function, shapes, expected):
    check(function, *map(draw, shapes), name=name, expected=expected)
