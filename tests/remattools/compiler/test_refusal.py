# SPDX-License-Identifier: Apache-2.0
"""A program that runs out of memory is measured as far as the compiler and the lowered program say."""

import functools

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

import remattools as rt
from remattools.compiler.refusal import is_out_of_memory, make_refusal

MESSAGE = (
    "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO "
    "temporaries (1.00M) exceeds available HBM (512.00K)."
)
ROW_BYTES = 64 * 4


def _refuse(lowered):
    return make_refusal(jax.errors.JaxRuntimeError(MESSAGE), lowered, rt.find_target("cpu"), 0.5)


def _double(x, y):
    return x * 2 + y


X = jax.ShapeDtypeStruct((100, 64), jnp.float32)


@pytest.mark.parametrize("donated", [(), (0,)], ids=["kept", "donated"])
@pytest.mark.parametrize("jit", [jax.jit, nnx.jit], ids=["jax", "nnx"])
def test_arguments_results_and_donation_are_known_without_a_compile(jit, donated):
    refused = _refuse(jit(_double, donate_argnums=donated).lower(X, X))
    assert not refused.fits
    assert refused.argument_bytes == 200 * ROW_BYTES
    assert refused.output_bytes == 100 * ROW_BYTES
    assert refused.alias_bytes == (100 * ROW_BYTES if donated else 0)
    assert refused.total_bytes == refused.out_of_memory.needed_bytes == 2**20
    assert refused.temp_bytes == 2**20 - 300 * ROW_BYTES + refused.alias_bytes
    assert refused.notes == ()


def test_a_model_that_the_step_changes_is_counted():
    model = nnx.eval_shape(lambda: nnx.Linear(64, 64, rngs=nnx.Rngs(0)))
    refused = _refuse(nnx.jit(lambda model, x: model(x)).lower(model, X))
    weights = 65 * ROW_BYTES
    assert refused.argument_bytes == weights + 100 * ROW_BYTES
    assert refused.output_bytes >= 100 * ROW_BYTES


def test_bytes_are_those_of_one_device():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = NamedSharding(mesh, PartitionSpec("data"))
    x = jax.ShapeDtypeStruct(X.shape, X.dtype, sharding=rows)
    refused = _refuse(jax.jit(_double).lower(x, x))
    assert refused.argument_bytes == 50 * ROW_BYTES
    assert "not yet divided" in refused.notes[0]
    divided = _refuse(jax.jit(_double, out_shardings=rows).lower(x, x))
    assert divided.output_bytes == 25 * ROW_BYTES
    assert divided.notes == ()  # control


def test_other_refusals_are_not_out_of_memory():
    assert is_out_of_memory(jax.errors.JaxRuntimeError(MESSAGE))
    assert is_out_of_memory(jax.errors.JaxRuntimeError("INTERNAL: Out of memory allocating 3 bytes"))
    assert not is_out_of_memory(jax.errors.JaxRuntimeError("UNIMPLEMENTED: no such operation"))  # control


def test_the_memory_of_a_kernel_is_not_split_into_arguments():
    target = rt.find_target("cpu")
    vmem = jax.errors.JaxRuntimeError(
        "RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem. Used 64M of 16M vmem."
    )
    tpu = type(target)(name="tpu:v5e:2x2", platform="tpu", devices=target.devices, live=False)
    refused = make_refusal(vmem, jax.jit(_double).lower(X, X), tpu, 0.0)
    assert refused.temp_bytes == 64 * 2**20


def _train(model, optimizer, x):
    loss, gradients = nnx.value_and_grad(lambda model: jnp.mean(jnp.sin(model(x)) ** 2))(model)
    optimizer.update(model, gradients)
    return loss


def _make_training():
    def build():
        model = nnx.Linear(1024, 1024, rngs=nnx.Rngs(0))
        return model, nnx.Optimizer(model, optax.adamw(1e-3), wrt=nnx.Param)

    return nnx.eval_shape(build)


def _sort(x):
    return jnp.sort(jnp.sin(x), axis=0)


BIG = jax.ShapeDtypeStruct((2**21, 1024), jnp.float32)


@pytest.mark.parametrize(
    "wrap",
    [
        pytest.param(jax.jit, id="jax.jit"),
        pytest.param(nnx.jit, id="nnx.jit"),
        pytest.param(functools.partial(jax.jit, donate_argnums=0), id="donated"),
        pytest.param(lambda fn: fn, id="plain"),
    ],
)
def test_every_kind_of_function_gives_a_result_on_a_tpu(tpu, wrap):
    measured = rt.measure(wrap(_sort), BIG, target=tpu)
    assert measured.out_of_memory.excess_bytes > 0
    assert measured.out_of_memory.largest
    assert rt.measure(wrap(_sort), X, target=tpu).fits  # control


def test_a_whole_step_gives_a_result_on_a_tpu(tpu):
    model, optimizer = _make_training()
    measured = rt.measure(nnx.jit(_train), model, optimizer, BIG, target=tpu)
    assert measured.out_of_memory.needed_bytes > measured.out_of_memory.limit_bytes
    assert "mul" in [value.name for value in measured.out_of_memory.largest]


def test_a_program_in_shard_map_gives_a_result_on_a_tpu(tpu):
    target = rt.find_target(tpu)
    mesh = target.mesh((4,), ("data",))
    rows = PartitionSpec("data")
    fn = jax.jit(jax.shard_map(_sort, mesh=mesh, in_specs=rows, out_specs=rows))
    x = jax.ShapeDtypeStruct((2**23, 1024), jnp.float32, sharding=NamedSharding(mesh, rows))
    measured = rt.measure(fn, x, target=tpu)
    assert measured.out_of_memory.needed_bytes > measured.out_of_memory.limit_bytes
    assert measured.argument_bytes == 8 * 2**30  # of one device
