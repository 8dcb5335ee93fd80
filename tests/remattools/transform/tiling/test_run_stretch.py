# SPDX-License-Identifier: Apache-2.0
"""A stretch as a scan of pieces: what is kept, how gradients are added, which transforms it is under."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import remattools as rt
from remattools.jaxpr import jaxprs
from remattools.transform.naming.names import TILE_RESULT, TILE_ROW

from .sizes import find_largest

WIDTH, VOCABULARY, ROWS = 16, 256, 64


def _loss(w, x):
    return jax.nn.logsumexp((x @ w).astype(jnp.promote_types(w.dtype, jnp.float32)), axis=-1).mean()


def _make(dtype, rows=ROWS):
    keys = jax.random.split(jax.random.key(0))
    w = jax.random.normal(keys[0], (WIDTH, VOCABULARY), jnp.float32) / 4
    return w.astype(dtype), jax.random.normal(keys[1], (rows, WIDTH), jnp.float32).astype(dtype)


def _find_names(jaxpr):
    for equation in jaxprs.open_jaxpr(jaxpr).eqns:
        name = jaxprs.get_checkpoint_name(equation)
        if name is not None:
            yield name
        for _, below in jaxprs.find_subjaxprs(equation):
            yield from _find_names(below)


def test_results_and_rows_have_names_for_regions_around():
    names = set(_find_names(jax.make_jaxpr(rt.tile(_loss, pieces=4))(*_make(jnp.float32))))
    assert names == {TILE_RESULT, TILE_ROW}
    without = set(_find_names(jax.make_jaxpr(rt.tile(_loss, pieces=4, keep_rows=False))(*_make(jnp.float32))))
    assert without == {TILE_RESULT}


def test_the_largest_value_of_the_program_is_one_piece():
    def measure_largest(fn):
        return find_largest(jax.make_jaxpr(jax.grad(fn))(*_make(jnp.float32, rows=512)))

    whole, pieces = measure_largest(_loss), measure_largest(rt.tile(_loss, pieces=8))
    assert pieces <= whole / 8


@pytest.mark.parametrize("pieces", [8, 64, 256])
def test_gradients_in_bfloat16_are_as_exact_as_without_pieces(pieces):
    w, x = _make(jnp.bfloat16, rows=512)
    with jax.enable_x64(True):
        exact = np.asarray(jax.grad(_loss)(w.astype(jnp.float64), x.astype(jnp.float64)))

    def measure_error(loss):
        found = np.asarray(jax.jit(jax.grad(loss))(w, x), np.float64)
        return np.abs(found - exact).max() / np.abs(exact).max()

    plain = measure_error(_loss)
    assert measure_error(rt.tile(_loss, pieces=pieces)) <= 1.05 * plain
    if pieces == 256:  # control: added in their own dtype
        assert measure_error(rt.tile(_loss, pieces=pieces, accumulate=None)) > 2 * plain


def _use_vmap(loss):
    return lambda w, x: jax.vmap(loss, (None, 0))(w, jnp.stack([x, 2 * x])).sum()


def _use_scan(loss):
    return lambda w, x: jax.lax.scan(lambda total, row: (total + loss(w, row), None), 0.0, jnp.stack([x, 2 * x]))[0]


def _use_checkpoint(loss):
    return jax.checkpoint(loss)


@pytest.mark.parametrize("transform", [lambda loss: loss, _use_vmap, _use_scan, _use_checkpoint])
def test_values_and_gradients_are_equal_under_transforms(transform):
    with jax.enable_x64(True):
        w, x = _make(jnp.float64)
        plain, tiled = (jax.value_and_grad(transform(loss), (0, 1)) for loss in (_loss, rt.tile(_loss, pieces=4)))
        for expected, found in zip(*map(jax.tree.leaves, (plain(w, x), jax.jit(tiled)(w, x))), strict=True):
            np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-14)


def test_forward_mode_and_second_derivatives_are_equal():
    with jax.enable_x64(True):
        w, x = _make(jnp.float64)
        tiled = rt.tile(_loss, pieces=4)
        for loss in (jax.jvp, lambda fn, a, t: jax.jvp(jax.grad(fn), a, t)):
            expected, found = (loss(fn, (w, x), (jnp.cos(w), jnp.sin(x))) for fn in (_loss, tiled))
            for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
                np.testing.assert_allclose(b, a, rtol=1e-11, atol=1e-14)


def test_sums_are_placed_as_the_whole_value_under_an_explicit_mesh():
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)

    def mix(w, v, x):
        return jnp.tanh(jnp.exp(jnp.sin(x @ w))) @ v

    with jax.set_mesh(mesh):
        x = jax.device_put(jnp.sin(jnp.arange(256.0)).reshape(8, 8, 4), NamedSharding(mesh, P("data")))
        w, v = (
            jax.device_put(jnp.cos(jnp.arange(1024.0)).reshape(s), NamedSharding(mesh, P()))
            for s in ((4, 256), (256, 4))
        )
        results = []
        for fn in (mix, rt.tile(mix, axis=2)):
            loss = lambda w, v, x, fn=fn: (fn(w, v, x) ** 2).sum()  # noqa: E731
            results.append(jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(w, v, x))
        assert jax.typeof(jax.jit(rt.tile(mix, axis=2))(w, v, x)).sharding.spec == P("data", None, None)
        for expected, found in zip(*map(jax.tree.leaves, results), strict=True):
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
        with pytest.raises(rt.RuleError, match="explicit mesh divides"):
            jax.jit(rt.tile(lambda w, x: mix(w, v, x).sum(), axis="batch"))(w, x)
