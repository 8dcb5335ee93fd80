# SPDX-License-Identifier: Apache-2.0
"""The devices of the arguments decide where a program is compiled and run; JAX itself is the control."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

import remattools as rt
from remattools.compiler import placement
from remattools.tracing import pure_call


def apply(model, x):
    return jnp.sum(model(x))


def make_linear(device=None):
    model = nnx.Linear(8, 8, rngs=nnx.Rngs(0))
    if device is not None:
        nnx.update(model, jax.device_put(nnx.state(model), device))
    return model


@pytest.mark.parametrize("target", [None, "cpu", "device"])
def test_arguments_on_different_devices_are_refused_as_in_jax(target):
    first, second = jax.devices()[1:3]
    model, x = make_linear(first), jax.device_put(jnp.ones((2, 8)), second)
    with pytest.raises(ValueError, match="incompatible devices"):
        nnx.jit(apply)(model, x)
    with pytest.raises(rt.MeasureError, match="was put on cpu:1, x on cpu:2") as caught:
        rt.measure(apply, model, x, target=first if target == "device" else target)
    assert "jax.device_put" in caught.value.fix


@pytest.mark.parametrize("target", [None, "cpu"])
def test_a_call_is_measured_on_the_device_of_its_arguments(target):
    device = jax.devices()[3]
    call = pure_call.stage(apply, (make_linear(device), jnp.ones((2, 8))))
    assert placement.choose_target(call, target).devices == (device,)
    assert rt.measure(apply, make_linear(device), jnp.ones((2, 8)), target=target, run=True, repeats=1).step_s > 0
    untouched = pure_call.stage(apply, (make_linear(), jnp.ones((2, 8))))  # control
    assert placement.choose_target(untouched, target).devices == tuple(jax.devices())


def test_a_call_is_not_run_away_from_its_arguments():
    model, x = make_linear(jax.devices()[1]), jnp.ones((2, 8))
    with pytest.raises(rt.MeasureError, match=r"run=True on cpu:2, but .* was put on cpu:1"):
        rt.measure(apply, model, x, target=jax.devices()[2], run=True)
    assert rt.measure(apply, model, x, target=jax.devices()[2]).argument_bytes > 0  # only compiled for it
    assert rt.measure(apply, make_linear(), x, target=jax.devices()[2], run=True, repeats=1).step_s > 0  # uncommitted


def test_sharded_arguments_stay_on_their_mesh():
    mesh = jax.make_mesh((4,), ("data",))
    model, x = make_linear(NamedSharding(mesh, PartitionSpec())), jnp.ones((8, 8))
    sharded = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))
    assert rt.measure(apply, model, sharded, run=True, repeats=1).step_s > 0
    with pytest.raises(rt.MeasureError, match="cpu:0, cpu:1, cpu:2, cpu:3"):
        rt.measure(apply, model, jax.device_put(x, jax.devices()[5]))
