# SPDX-License-Identifier: Apache-2.0
"""How a call is lowered: jitted functions as they are, everything else as `jax.jit` would."""

import functools

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import remattools as rt
from remattools.compiler.lower import compute_program_key, lower
from remattools.tracing import pure_call
from tests.remattools.models import Tower, inputs, loss


def _square(weights, x):
    return jnp.sum((x @ weights) ** 2)


def _make_abstract(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _lower(fn, *args, differentiate=False):
    return lower(pure_call.stage(fn, args), rt.find_target("cpu"), differentiate=differentiate)


def test_equal_programs_have_equal_keys():
    target = rt.find_target("cpu")
    shapes = _make_abstract(8, 8), _make_abstract(4, 8)
    key = compute_program_key(_lower(_square, *shapes).lowered, target)
    assert key == compute_program_key(_lower(_square, *shapes).lowered, target)
    assert key != compute_program_key(_lower(_square, *shapes, differentiate=True).lowered, target)
    assert key != compute_program_key(_lower(_square, _make_abstract(8, 8), _make_abstract(2, 8)).lowered, target)


def test_inputs_are_rebuilt_from_leaves():
    weights, x = jnp.ones((8, 8)), jnp.ones((4, 8))
    program = _lower(_square, weights, x)
    assert [value.shape for value in program.make_inputs([weights, x])] == [(8, 8), (4, 8)]
    differentiated = _lower(_square, weights, x, differentiate=True)
    assert differentiated.make_inputs([weights, x]) == ([weights, x],)  # one list of leaves


def test_a_jitted_function_keeps_its_donation():
    model, x = Tower(), inputs()

    @functools.partial(jax.jit, donate_argnums=0)
    def step(weights, x):
        return weights - jax.grad(_square)(weights, x)

    weights = jnp.ones((64, 64))
    measured = rt.measure(step, weights, _make_abstract(8, 64), target="cpu")
    assert measured.alias_bytes == weights.nbytes
    assert not weights.is_deleted()

    train = nnx.jit(nnx.grad(loss))
    raw = train.lower(model, x).lowered.compile()
    assert rt.measure(train, model, x, target="cpu").flops == raw.cost_analysis()["flops"]


def test_a_step_is_not_differentiated_as_a_loss():
    def step(model, x):
        value, gradients = nnx.value_and_grad(loss)(model, x)
        nnx.update(model, jax.tree.map(lambda w, g: w - g, nnx.state(model, nnx.Param), gradients))
        return value

    model, x = nnx.eval_shape(Tower), inputs()
    for fn in (step, nnx.jit(step)):
        with pytest.raises(rt.MeasureError) as caught:
            rt.measure(fn, model, x, differentiate=True, target="cpu")
        assert "--as-is" in str(caught.value)
        assert rt.measure(fn, model, x, target="cpu").fits

    def penalty(model, x):
        return jnp.sum(jax.grad(lambda x: loss(model, x))(x) ** 2)

    measured = rt.measure(penalty, model, x, differentiate=True, target="cpu")
    graphdef, state = nnx.split(Tower())
    raw = jax.jit(lambda s, x: jax.grad(lambda s: penalty(nnx.merge(graphdef, s), x))(s)).lower(state, x).compile()
    assert measured.flops == raw.cost_analysis()["flops"]
