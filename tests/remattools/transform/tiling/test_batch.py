# SPDX-License-Identifier: Apache-2.0
"""Gradient accumulation of an unedited loss: exact, or refused with the operation that mixes rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import remattools as rt

from . import losses

WIDTH, BATCH, LENGTH = 16, 8, 16


def _make():
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (BATCH, LENGTH, WIDTH))
    w = jax.random.normal(keys[1], (WIDTH, losses.VOCABULARY)) / 4
    return w, x, jax.random.randint(keys[2], (BATCH, LENGTH), 0, losses.VOCABULARY)


@pytest.mark.parametrize("pieces", [4, 3], ids=["divides", "the last piece is shorter"])
@pytest.mark.parametrize("loss", [losses.with_optax, losses.masked_mean, losses.preference, losses.custom_derivative])
def test_a_loss_over_rows_is_exact(loss, pieces):
    with jax.enable_x64(True):
        w, x, y = _make()
        plain, tiled = (jax.value_and_grad(fn, (0, 1)) for fn in (loss, rt.tile(loss, pieces=pieces, axis="batch")))
        for expected, found in zip(*map(jax.tree.leaves, (plain(w, x, y), jax.jit(tiled)(w, x, y))), strict=True):
            np.testing.assert_allclose(found, expected, rtol=1e-11, atol=1e-15)


def test_rows_that_are_mixed_are_refused_with_the_line():
    with pytest.raises(rt.RuleError, match=r"reduce_sum \(.*losses\.py:\d+\) mixes its rows"):
        jax.jit(rt.tile(losses.centred, pieces=4, axis="batch"))(*_make())


class _Norm(nnx.Module):
    def __init__(self, rngs):
        self.linear, self.norm = nnx.Linear(WIDTH, 32, rngs=rngs), nnx.BatchNorm(32, rngs=rngs)

    def __call__(self, x):
        return self.norm(self.linear(x))


def test_batch_normalisation_is_refused():
    loss = rt.tile(lambda model, x: jnp.mean(model(x) ** 2), pieces=4, axis="batch")
    with pytest.raises(rt.RuleError, match="mixes its rows"):
        nnx.jit(nnx.value_and_grad(loss))(_Norm(nnx.Rngs(0)), _make()[1])


class _Dropout(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(WIDTH, 32, dtype=jnp.float64, param_dtype=jnp.float64, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.drop(self.linear(x))


def test_dropout_draws_the_same_masks_and_counts_once():
    def loss(model, x):
        return jnp.mean(model(x) ** 2)

    with jax.enable_x64(True):
        results = []
        for fn in (loss, rt.tile(loss, pieces=4, axis="batch")):
            model = _Dropout(nnx.Rngs(0))
            value, grads = nnx.jit(nnx.value_and_grad(fn))(model, _make()[1])
            results.append((value, nnx.to_pure_dict(grads), int(model.drop.rngs.count[...])))
        (value, grads, count), (tiled_value, tiled_grads, tiled_count) = results
        assert (count, tiled_count) == (1, 1)
        np.testing.assert_allclose(tiled_value, value, rtol=1e-12)
        for expected, found in zip(jax.tree.leaves(grads), jax.tree.leaves(tiled_grads), strict=True):
            np.testing.assert_allclose(found, expected, rtol=1e-11, atol=1e-15)


def test_arrays_of_different_length_are_refused():
    w, x, _ = _make()
    with pytest.raises(rt.RuleError, match="no leading axis in common"):
        jax.jit(rt.tile(lambda w, x, scale: jnp.mean((x @ w) * scale.sum()), axis="batch"))(w, x, jnp.ones(3))
