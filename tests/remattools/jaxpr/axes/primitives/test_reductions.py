# SPDX-License-Identifier: Apache-2.0
"""Reductions are cut along the axes that stay; sums also along the axes that go."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from ..cutting import check, draw


def _pool(x):
    return lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 1), (1, 2, 1), "VALID")


def _average(x):
    return lax.reduce_window(x, 0.0, lax.add, (1, 3, 1), (1, 1, 1), "SAME")


@pytest.mark.parametrize(
    ("name", "function", "expected"),
    [
        pytest.param("reduce_sum", lambda x: x.sum(1), ["0 -> 0", "2 -> 1", "1 -> sum"], id="sum"),
        pytest.param("reduce_sum", lambda x: x.sum((0, 2)), ["1 -> 0", "0 -> sum", "2 -> sum"], id="sum-of-two"),
        pytest.param("reduce_max", lambda x: x.max(1), ["0 -> 0", "2 -> 1"], id="max"),
        pytest.param("reduce_min", lambda x: x.min(1), ["0 -> 0", "2 -> 1"], id="min"),
        pytest.param("reduce_prod", lambda x: x.prod(1), ["0 -> 0", "2 -> 1"], id="prod"),
        pytest.param("reduce_and", lambda x: (x > 0).all(1), ["0 -> 0", "2 -> 1"], id="and"),
        pytest.param("reduce_or", lambda x: (x > 0).any(1), ["0 -> 0", "2 -> 1"], id="or"),
        pytest.param("argmax", lambda x: x.argmax(1), ["0 -> 0", "2 -> 1"], id="argmax"),
        pytest.param("argmin", lambda x: x.argmin(0), ["1 -> 0", "2 -> 1"], id="argmin"),
        pytest.param("cumsum", lambda x: x.cumsum(1), ["0 -> 0", "2 -> 2"], id="cumsum"),
        pytest.param("cumlogsumexp", lambda x: lax.cumlogsumexp(x, 1), ["0 -> 0", "2 -> 2"], id="cumlogsumexp"),
        pytest.param("cummax", lambda x: lax.cummax(x, 1), ["0 -> 0", "2 -> 2"], id="cummax"),
        pytest.param("cumprod", lambda x: lax.cumprod(x, 1), ["0 -> 0", "2 -> 2"], id="cumprod"),
        pytest.param("sort", lambda x: jnp.sort(x, 1), ["0 -> 0", "2 -> 2"], id="sort"),
        pytest.param("sort", lambda x: lax.sort((x, -x), dimension=0), ["1 1 -> 1 1", "2 2 -> 2 2"], id="sort-of-two"),
        pytest.param("top_k", lambda x: lax.top_k(x, 2), ["0 -> 0 0", "1 -> 1 1"], id="top_k"),
        pytest.param(
            "reduce",
            lambda x: lax.reduce(x, 0.0, lambda a, b: a + 2 * b, (1,)),
            ["0 . -> 0", "2 . -> 1"],
            id="any-function",
        ),
        pytest.param("reduce_window_max", _pool, ["0 -> 0", "2 -> 2"], id="pooling"),
        pytest.param("reduce_window_sum", _average, ["0 -> 0", "2 -> 2"], id="averages"),
        pytest.param(
            "select_and_scatter_add",
            lambda x: jax.grad(lambda x: _pool(x).sum())(x),
            ["0 0 -> 0", "2 2 -> 2"],
            id="pooling-back",
        ),
    ],
)
def test_factors_and_pieces(name, function, expected):
    check(function, draw((4, 6, 3)), name=name, expected=expected)


def test_integer_sums_are_exact():
    check(
        lambda x: jnp.sum(x, 0, dtype=jnp.int8),
        jnp.arange(24, dtype=jnp.int8).reshape(6, 4),
        name="reduce_sum",
        expected=["1 -> 0", "0 -> sum"],
    )
