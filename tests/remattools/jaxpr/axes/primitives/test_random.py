# SPDX-License-Identifier: Apache-2.0
"""Positions and random bits of a piece are those of the whole."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from remattools.jaxpr.axes.primitives.random import _compute_flat_index

from ..cutting import check, find_equation, find_factors


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.uint8, jnp.float64, jnp.bfloat16])
@pytest.mark.parametrize("dimension", [0, 1])
def test_positions_of_an_iota(dtype, dimension):
    check(lambda: lax.broadcasted_iota(dtype, (6, 4), dimension), name="iota", expected=["-> 0", "-> 1"])


@pytest.mark.parametrize("dtype", [jnp.uint8, jnp.uint16, jnp.uint32, jnp.uint64])
def test_bits_of_a_key(dtype):
    check(
        lambda key: jax.random.bits(key, (6, 4, 3), dtype),
        jax.random.key(3),
        name="random_bits",
        expected=[". -> 0", ". -> 1", ". -> 2"],
    )


def test_bits_of_a_vector_of_keys():
    keys = jax.random.split(jax.random.key(3), 4)
    check(
        jax.vmap(lambda key: jax.random.bits(key, (6, 3))),
        keys,
        name="random_bits",
        expected=["0 -> 0", ". -> 1", ". -> 2"],
    )


@pytest.mark.parametrize(
    "draw",
    [
        pytest.param(lambda: jax.random.bits(jax.random.key(0, impl="rbg"), (6,)), id="another-generator"),
        pytest.param(lambda: _draw_without_positions(), id="not-by-position"),
    ],
)
def test_bits_that_depend_on_all_others_have_no_factor(draw):
    equation, _ = find_equation(draw, name="random_bits")
    assert find_factors(equation) == ()


def _draw_without_positions(key=None):
    with jax.threefry_partitionable(False):
        return jax.random.bits(jax.random.key(0) if key is None else key, (6,))


def test_keys_of_a_vector_are_independent_even_where_bits_of_one_are_not():
    keys = jax.random.split(jax.random.key(3), 4)
    check(jax.vmap(_draw_without_positions), keys, name="random_bits", expected=["0 -> 0"])


@pytest.mark.parametrize("shape", [(3, 5), (2**20, 2**13), (2**31, 2**20), (5, 2**33 + 7)])
def test_flat_indices_beyond_32_bits(shape):
    rows = [0, 1, shape[0] - 1]
    positions = [jnp.array(rows), jnp.array([0, 1, min(shape[1], 2**31) - 1])]
    positions = [position.astype(jnp.int32) for position in positions]
    high, low = _compute_flat_index(positions, shape)
    expected = np.array([[int(a) * shape[1] + int(b) for b in positions[1]] for a in positions[0]], dtype=np.uint64)
    np.testing.assert_array_equal((np.asarray(high, np.uint64) << np.uint64(32)) | np.asarray(low, np.uint64), expected)


@pytest.mark.parametrize(
    ("name", "function", "expected"),
    [
        pytest.param("random_unwrap", jax.random.key_data, ["0 -> 0"], id="data"),
        pytest.param(
            "random_wrap", lambda key: jax.random.wrap_key_data(jax.random.key_data(key)), ["0 -> 0"], id="wrap"
        ),
        pytest.param("random_split", jax.vmap(jax.random.split), ["0 -> 0"], id="split"),
        pytest.param("random_fold_in", jax.vmap(lambda key: jax.random.fold_in(key, 3)), ["0 . -> 0"], id="fold-in"),
        pytest.param("random_seed", lambda key: jax.vmap(jax.random.key)(jnp.arange(4)), ["0 -> 0"], id="seed"),
        pytest.param("slice", lambda keys: keys[:2], [], id="control-part-of-the-keys"),
    ],
)
def test_arrays_of_keys(name, function, expected):
    check(function, jax.random.split(jax.random.key(3), 4), name=name, expected=expected)
