# SPDX-License-Identifier: Apache-2.0
"""A ruled model under every transform, closed over and passed; none of them changes it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

import remattools as rt
from tests.remattools.exactness import assert_exact, assert_same_values
from tests.remattools.models import Block, Tower, inputs, loss

RULES = {"layers.*": "nothing_saveable", "attention": rt.Remat(save=("qkv",))}


def _assert_unchanged(model, before):
    jax.tree.map(np.testing.assert_array_equal, nnx.to_pure_dict(nnx.state(model)), before)
    assert not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(nnx.state(model)))
    model(inputs())  # and it still runs


CLOSED_OVER = {
    "jit": lambda m, x: jax.jit(lambda x: m(x))(x),
    "nnx-jit": lambda m, x: nnx.jit(lambda x: m(x))(x),
    "grad": lambda m, x: jax.grad(lambda x: loss(m, x))(x),
    "jit-of-value-and-grad": lambda m, x: jax.jit(jax.value_and_grad(lambda x: loss(m, x)))(x),
    "vmap": lambda m, x: jax.vmap(lambda x: m(x))(x),
    "vmap-of-grad": lambda m, x: jax.vmap(jax.grad(lambda x: loss(m, x)))(x),
    "scan": lambda m, x: jax.lax.scan(lambda c, _: (m(c), None), x, None, length=2)[0],
    "grad-of-scan": lambda m, x: jax.grad(lambda x: jnp.sum(jax.lax.scan(lambda c, _: (m(c), None), x, None, 2)[0]))(x),
    "fori": lambda m, x: jax.lax.fori_loop(0, 2, lambda _, c: m(c), x),
    "while": lambda m, x: jax.lax.while_loop(lambda c: c[0] < 2, lambda c: (c[0] + 1, m(c[1])), (0, x))[1],
    "cond": lambda m, x: jax.lax.cond(x[0, 0, 0] > 0, lambda x: m(x), lambda x: x, x),
    "jvp": lambda m, x: jax.jvp(lambda x: m(x), (x,), (x,)),
    "hessian-vector": lambda m, x: jax.jvp(jax.grad(lambda x: loss(m, x)), (x,), (x,))[1],
    "checkpoint": lambda m, x: jax.grad(lambda x: jnp.sum(jax.checkpoint(lambda x: m(x))(x)))(x),
    "eval-shape": lambda m, x: jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(lambda x: m(x), x)),
}


@pytest.mark.parametrize("name", CLOSED_OVER)
def test_a_model_closed_over(name):
    plain, ruled = Tower(depth=2), rt.apply(Tower(depth=2), RULES)
    before = nnx.to_pure_dict(nnx.state(ruled))
    x = inputs()
    assert_same_values(CLOSED_OVER[name](ruled, x), CLOSED_OVER[name](plain, x))
    _assert_unchanged(ruled, before)


PASSED = {
    "jit": lambda m, x: nnx.jit(lambda m, x: m(x))(m, x),
    "grad": lambda m, x: nnx.to_pure_dict(nnx.grad(loss)(m, x)),
    "value-and-grad": lambda m, x: nnx.value_and_grad(loss)(m, x)[0],
    "vmap": lambda m, x: nnx.vmap(lambda m, x: m(x), in_axes=(None, 0))(m, x),
    "eval-shape": lambda m, x: jax.tree.map(
        lambda s: jnp.zeros(s.shape, s.dtype), nnx.eval_shape(lambda m, x: m(x), m, x)
    ),
    "remat": lambda m, x: nnx.to_pure_dict(nnx.grad(lambda m, x: jnp.sum(nnx.remat(lambda m, x: m(x))(m, x)))(m, x)),
    "scan": lambda m, x: nnx.scan(lambda c, m: m(c), in_axes=(nnx.Carry, None), out_axes=nnx.Carry, length=2)(x, m),
}


@pytest.mark.parametrize("name", PASSED)
def test_a_model_passed(name):
    plain, ruled = Tower(depth=2), rt.apply(Tower(depth=2), RULES)
    before = nnx.to_pure_dict(nnx.state(ruled))
    x = inputs()
    assert_same_values(PASSED[name](ruled, x), PASSED[name](plain, x))
    _assert_unchanged(ruled, before)


def test_a_model_as_a_pytree_under_plain_jax():
    plain, ruled = Tower(depth=2), rt.apply(Tower(depth=2), RULES)
    x = inputs()
    grad = jax.jit(jax.grad(loss, allow_int=True))
    assert_same_values(jax.tree.leaves(grad(ruled, x)), jax.tree.leaves(grad(plain, x)))


def test_layers_stacked_by_vmap_and_run_by_scan():
    class Stacked(nnx.Module):
        def __init__(self, depth=3, width=8):
            keys = nnx.Rngs(0).split(depth)
            self.layers = nnx.vmap(lambda rngs: Block(width, rngs), in_axes=0, out_axes=0)(keys)

        def __call__(self, x):
            return nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.layers)

    for rules in ({"layers": "nothing_saveable"}, {"layers.mlp": rt.Remat(save=("up",))}):
        assert_exact(loss, Stacked(), rt.apply(Stacked(), rules), inputs())


def test_tree_mode():
    with nnx.set_graph_mode(False):
        plain, ruled = Tower(depth=2), rt.apply(Tower(depth=2), RULES)
        x = inputs()
        step = nnx.jit(lambda m, x: nnx.grad(loss)(m, x))
        assert_same_values(jax.tree.leaves(step(ruled, x)), jax.tree.leaves(step(plain, x)))


def test_a_train_step_with_an_optimizer():
    import optax

    def train(model):
        optimizer = nnx.Optimizer(model, optax.sgd(1e-3, momentum=0.9), wrt=nnx.Param)

        @nnx.jit
        def step(model, optimizer, x):
            value, grads = nnx.value_and_grad(loss)(model, x)
            optimizer.update(model, grads)
            return value

        for _ in range(3):
            step(model, optimizer, inputs())
        return nnx.to_pure_dict(nnx.state((model, optimizer)))

    assert_same_values(train(rt.apply(Tower(depth=2), RULES)), train(Tower(depth=2)))


@pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 host devices; tests/conftest.py asks XLA for them")
@pytest.mark.parametrize("explicit", [False, True], ids=["jit", "shard_map"])
def test_sharded_parameters_on_a_mesh_of_eight(explicit):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    x = jax.device_put(inputs(batch=8), NamedSharding(mesh, PartitionSpec("data")))

    def run(model):
        graphdef, state = nnx.split(model)
        spec = lambda leaf: PartitionSpec(*(None,) * (leaf.ndim - 1), "model" if leaf.ndim > 1 else None)  # noqa: E731
        state = jax.tree.map(lambda leaf: jax.device_put(leaf, NamedSharding(mesh, spec(leaf))), state)

        def local(state, x):
            return loss(nnx.merge(graphdef, state, copy=True), x)

        if explicit:
            shard = functools.partial(jax.shard_map, mesh=mesh, out_specs=PartitionSpec())
            mapped = shard(
                lambda state, x: jax.lax.psum(local(state, x), ("data",)),
                in_specs=(PartitionSpec(), PartitionSpec("data")),
            )
            return jax.jit(jax.grad(mapped, allow_int=True))(state, x)
        return jax.jit(jax.grad(local, allow_int=True))(state, x)

    ours, theirs = run(rt.apply(Tower(depth=2), RULES)), run(Tower(depth=2))
    assert_same_values(jax.tree.leaves(ours), jax.tree.leaves(theirs))


def test_float64():
    with jax.enable_x64(True):
        plain, ruled = Tower(depth=2), Tower(depth=2)
        for model in (plain, ruled):
            state = jax.tree.map(lambda a: a.astype(jnp.float64), nnx.state(model, nnx.Param))
            nnx.update(model, state)
        x = inputs().astype(jnp.float64)
        assert_exact(loss, plain, rt.apply(ruled, RULES), x)
