# SPDX-License-Identifier: Apache-2.0
"""Losses as people write them: the logits vanish, and nothing else changes, under every transform."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import remattools as rt
from remattools import compat
from remattools.jaxpr.axes import pieces as axes_pieces
from remattools.jaxpr.axes.rules import RULES
from remattools.transform.tiling import evaluate
from remattools.transform.tiling.program import Stretch, count_bytes

from . import losses

BATCH, LENGTH, WIDTH = 8, 64, 16
# Under other transforms: a loss of each kind in the default run, all in the long one.
_KINDS = (
    losses.with_optax,
    losses.shifted_and_merged,
    losses.masked_mean,
    losses.odd_length,
    losses.policy_gradient,
    losses.custom_derivative,
)
EACH = pytest.mark.parametrize(
    "loss",
    [
        pytest.param(loss, id=loss.__name__, marks=() if loss in _KINDS else pytest.mark.long)
        for loss in (*losses.CUT, losses.centred)
    ],
)


@pytest.fixture(autouse=True)
def _in_float64():
    with jax.enable_x64(True):
        yield


def _make_inputs(batch=2):
    keys = jax.random.split(jax.random.key(0), 3)
    w = jax.random.normal(keys[0], (WIDTH, losses.VOCABULARY)) / 4
    x = jax.random.normal(keys[1], (batch, LENGTH, WIDTH))
    return w, x, jax.random.randint(keys[2], (batch, LENGTH), 0, losses.VOCABULARY)


def _assert_close(ours, plain):
    """Equal trees of floats, within 1e-12 of the largest value of each leaf."""
    assert jax.tree.structure(ours) == jax.tree.structure(plain)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(plain), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        assert jnp.issubdtype(b.dtype, jnp.float64)
        difference = float(np.abs(np.asarray(a) - np.asarray(b)).max())
        assert difference <= 1e-12 * float(np.abs(np.asarray(b)).max())


def _compare(transform, loss, *arguments, pieces=4):
    """Assert that a transform of the tiled loss computes what it computes of the plain one."""
    (ours, loops), (plain, own_loops) = (_run(transform(f), *arguments) for f in (rt.tile(loss, pieces=pieces), loss))
    assert loops > own_loops  # the pieces
    _assert_close(ours, plain)


def _run(function, *arguments):
    """Return what a jitted function computes, and the number of loops in its program."""
    traced = jax.jit(function).trace(*arguments)
    return traced.lower().compile()(*arguments), str(traced.jaxpr).count("scan[")


def _tile(loss, pieces):
    program, _ = evaluate.tile_program(jax.make_jaxpr(loss)(*_make_inputs()), rt.Tile(pieces))
    return program, [node for node in program.nodes if isinstance(node, Stretch)]


# 64 positions in 4 pieces; in 5 the last one is shorter, so rows are added and masked.
@pytest.mark.parametrize(
    ("loss", "pieces"),
    [
        pytest.param(loss, pieces, id=f"{loss.__name__}-{pieces}", marks=marks)
        for loss in losses.CUT
        for pieces, marks in ((5, ()), (4, () if loss in _KINDS else pytest.mark.long))
    ],
)
def test_logits_vanish_and_gradients_stay(loss, pieces):
    program, stretches = _tile(loss, pieces)
    assert stretches
    vanished = [var for stretch in stretches for var in stretch.vanished]
    logits = max(map(count_bytes, vanished))
    assert logits >= 2 * (LENGTH - 3) * losses.VOCABULARY * 8
    assert max(count_bytes(var) for node in program.nodes for var in node.outvars) < logits
    _compare(lambda f: jax.value_and_grad(f, (0, 1)), loss, *_make_inputs(), pieces=pieces)


def test_a_mean_over_all_rows_in_the_middle_stays_exact():
    _, stretches = _tile(losses.centred, 4)
    assert stretches
    _compare(lambda f: jax.value_and_grad(f, (0, 1)), losses.centred, *_make_inputs())


def test_a_loss_without_jit_has_the_same_gradients():
    arguments = _make_inputs()
    ours, plain = (jax.value_and_grad(f, (0, 1))(*arguments) for f in (rt.tile(losses.z_loss, pieces=4), losses.z_loss))
    _assert_close(ours, plain)


@EACH
def test_a_batch_of_losses_under_vmap_is_exact(loss):
    w, x, y = _make_inputs(BATCH)
    x, y = (value.reshape(4, 2, *value.shape[1:]) for value in (x, y))
    _compare(lambda f: jax.vmap(jax.value_and_grad(f, (0, 1)), (None, 0, 0)), loss, w, x, y)


@EACH
def test_hessian_vector_products_are_exact(loss):
    def multiply(f):
        def compute(w, x, y):
            return jax.grad(lambda v: jnp.vdot(jax.grad(f)(v, x, y), jnp.cos(v)))(w)

        return compute

    _compare(multiply, loss, *_make_inputs())


@EACH
def test_forward_mode_is_exact_where_the_loss_has_it(loss):
    def push(f):
        return lambda w, x, y: jax.jvp(lambda w, x: f(w, x, y), (w, x), (jnp.sin(w), jnp.cos(x)))

    if loss is losses.custom_derivative:  # a custom_vjp has no forward mode, tiled or not
        for function in (loss, rt.tile(loss, pieces=4)):
            with pytest.raises(TypeError, match="custom_vjp"):
                push(function)(*_make_inputs())
    else:
        _compare(push, loss, *_make_inputs())


@EACH
def test_steps_of_a_scan_are_exact(loss):
    def train(f):
        def compute(w, x, y):
            def step(w, batch):
                value, gradient = jax.value_and_grad(f)(w, *batch)
                return w - 0.1 * gradient, value

            return jax.lax.scan(step, w, (x, y))

        return compute

    w, x, y = _make_inputs(BATCH)
    _compare(train, loss, w, *(value.reshape(4, 2, *value.shape[1:]) for value in (x, y)))


@EACH
def test_losses_in_shard_map_over_the_batch_are_exact(loss):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.P("data")

    def shard(f):
        @functools.partial(jax.shard_map, mesh=mesh, in_specs=(jax.P(), spec, spec), out_specs=jax.P())
        def average(w, x, y):
            return jax.lax.pmean(f(w, x, y), "data")

        return jax.value_and_grad(average, (0, 1))

    w, x, y = _make_inputs(BATCH)
    _compare(shard, loss, w, *jax.device_put((x, y), jax.NamedSharding(mesh, spec)))


@EACH
def test_losses_of_a_sharded_batch_are_exact(loss):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    w, x, y = _make_inputs(BATCH)
    x, y = jax.device_put((x, y), jax.NamedSharding(mesh, jax.P("data")))
    _compare(lambda f: jax.value_and_grad(f, (0, 1)), loss, w, x, y)


def test_control_a_wrong_sum_over_the_axis_is_noticed(monkeypatch):
    rule, cut = RULES["reduce_sum"], []

    def add_wrongly(equation, factor, operands, piece):
        cut.append(factor.kind)
        (part,) = compat.bind(equation, operands, equation.params)
        return [part * (1 + 1e-9) if factor.kind == "sum" else part]

    monkeypatch.setitem(RULES, "reduce_sum", dataclasses.replace(rule, compute=add_wrongly))
    with pytest.raises(AssertionError):
        _compare(lambda f: jax.value_and_grad(f, (0, 1)), losses.z_loss, *_make_inputs())
    assert "sum" in cut


def test_control_rows_beyond_the_end_that_are_not_masked_are_noticed(monkeypatch):
    monkeypatch.setattr(axes_pieces, "_mask_operands", lambda equation, factor, operands, piece: operands)
    with pytest.raises(AssertionError):
        _compare(lambda f: jax.value_and_grad(f, (0, 1)), losses.z_loss, *_make_inputs(), pieces=5)
