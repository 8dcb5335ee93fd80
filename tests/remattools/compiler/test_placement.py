# SPDX-License-Identifier: Apache-2.0
"""Where the arguments were put decides where a program is compiled and run; JAX itself is the control."""

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


def linear(device=None):
    model = nnx.Linear(8, 8, rngs=nnx.Rngs(0))
    if device is not None:
        nnx.update(model, jax.device_put(nnx.state(model), device))
    return model


@pytest.mark.parametrize("target", [None, "cpu", "device"])
def test_arguments_on_different_devices_are_refused_as_jax_refuses_them(target):
    first, second = jax.devices()[1:3]
    model, x = linear(first), jax.device_put(jnp.ones((2, 8)), second)
    with pytest.raises(ValueError, match="incompatible devices"):
        nnx.jit(apply)(model, x)
    with pytest.raises(rt.MeasureError, match="was put on cpu:1, x on cpu:2") as caught:
        rt.measure(apply, model, x, target=first if target == "device" else target)
    assert "jax.device_put" in caught.value.fix


@pytest.mark.parametrize("target", [None, "cpu"])
def test_what_was_put_on_a_device_is_measured_there(target):
    device = jax.devices()[3]
    call = pure_call.stage(apply, (linear(device), jnp.ones((2, 8))))
    assert placement.choose_target(call, target).devices == (device,)
    assert rt.measure(apply, linear(device), jnp.ones((2, 8)), target=target, run=True, repeats=1).step_s > 0
    untouched = pure_call.stage(apply, (linear(), jnp.ones((2, 8))))  # control
    assert placement.choose_target(untouched, target).devices == tuple(jax.devices())


def test_nothing_is_run_where_the_arguments_are_not():
    model, x = linear(jax.devices()[1]), jnp.ones((2, 8))
    with pytest.raises(rt.MeasureError, match=r"run=True on cpu:2, but .* was put on cpu:1"):
        rt.measure(apply, model, x, target=jax.devices()[2], run=True)
    assert rt.measure(apply, model, x, target=jax.devices()[2]).argument_bytes > 0  # compiled for it only
    assert rt.measure(apply, linear(), x, target=jax.devices()[2], run=True, repeats=1).step_s > 0  # put nowhere


def test_what_is_spread_over_a_mesh_stays_there():
    mesh = jax.make_mesh((4,), ("data",))
    model, x = linear(NamedSharding(mesh, PartitionSpec())), jnp.ones((8, 8))
    spread = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))
    assert rt.measure(apply, model, spread, run=True, repeats=1).step_s > 0
    with pytest.raises(rt.MeasureError, match="cpu:0, cpu:1, cpu:2, cpu:3"):
        rt.measure(apply, model, jax.device_put(x, jax.devices()[5]))
