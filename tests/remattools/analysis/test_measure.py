# SPDX-License-Identifier: Apache-2.0
"""`measure` returns the compiler's numbers, for every way to write a call."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

import remattools as rt
from tests.remattools.models import Tower, inputs, loss


def _stack(weights, x):
    for _ in range(4):
        x = jnp.sin(jnp.cos(x @ weights) @ weights)
    return jnp.mean(x**2)


def _make_abstract(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _make_deleted(*shape):
    array = jnp.ones(shape)
    array.delete()
    return array


def _read_costs(compiled):
    memory, costs = compiled.memory_analysis(), compiled.cost_analysis()
    return {
        "argument_bytes": memory.argument_size_in_bytes,
        "output_bytes": memory.output_size_in_bytes,
        "alias_bytes": memory.alias_size_in_bytes,
        "temp_bytes": memory.temp_size_in_bytes,
        "peak_bytes": memory.peak_memory_in_bytes,
        "flops": costs["flops"],
        "bytes_accessed": costs["bytes accessed"],
    }


def _assert_equal_costs(measured, raw):
    assert {key: getattr(measured, key) for key in raw} == raw


def test_numbers_are_the_compilers_on_cpu():
    args = (_make_abstract(64, 64), _make_abstract(32, 64))
    measured = rt.measure(jax.grad(_stack), *args, target="cpu")
    _assert_equal_costs(measured, _read_costs(jax.jit(jax.grad(_stack)).lower(*args).compile()))
    _assert_equal_costs(rt.measure(_stack, *args, differentiate=True, target="cpu"), _select_costs(measured))
    assert measured.estimated_cycles is None
    assert measured.compile_s > 0
    assert measured.temp_bytes > rt.measure(_stack, *args, target="cpu").temp_bytes  # control: forward only


def _select_costs(measured):
    return {key: getattr(measured, key) for key in ("temp_bytes", "argument_bytes", "output_bytes", "flops")}


def test_numbers_are_the_compilers_on_tpu(tpu):
    target = rt.find_target(tpu)
    sharding = SingleDeviceSharding(target.devices[0])
    args = (_make_abstract(256, 256), _make_abstract(512, 256))
    placed = [jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding) for a in args]
    compiled = jax.jit(jax.grad(_stack)).trace(*placed).lower(lowering_platforms=("tpu",)).compile()
    measured = rt.measure(jax.grad(_stack), *args, target=tpu)
    _assert_equal_costs(measured, _read_costs(compiled))
    # Without loops the cycles are the sum over the whole text.
    cycles = sum(map(int, re.findall(r'"estimated_cycles":"(\d+)"', compiled.as_text())))
    assert measured.estimated_cycles == cycles > 0
    assert float(jnp.sin(1.0)) > 0  # JAX keeps running on the CPU


def test_cycles_of_a_loop_are_multiplied_by_its_trip_count(tpu):
    def looped(length, x):
        return jax.lax.scan(lambda c, _: (jnp.sin(c @ c), None), x, None, length=length)[0]

    x = _make_abstract(256, 256)
    short, long, longest = (
        rt.measure(functools.partial(looped, n), x, target=tpu).estimated_cycles for n in (10, 20, 30)
    )
    assert longest - long == long - short > 0
    assert longest > 2 * short


def test_passed_closed_over_and_abstract_models_measure_alike():
    model, x = Tower(), inputs()
    abstract = nnx.eval_shape(Tower)
    graphdef, state = nnx.split(model)
    raw = jax.jit(lambda s, x: loss(nnx.merge(graphdef, s), x)).lower(state, x).compile().memory_analysis()
    trainer = type("Trainer", (), {"loss": lambda self, x: loss(self.model, x)})()
    trainer.model = model
    calls = {
        "passed": (loss, model, x),
        "abstract": (loss, abstract, jax.ShapeDtypeStruct(x.shape, x.dtype)),
        "closed over": (lambda x: loss(model, x), x),
        "closed over, abstract": (lambda x: loss(abstract, x), x),
        "partial": (functools.partial(loss, model), x),
        "method of an object": (trainer.loss, x),
        "jitted inside": (lambda x: jax.jit(lambda y: loss(abstract, y))(x), x),
        "in a container": (lambda pair, x: loss(pair["model"], x), {"model": model}, x),
        "numpy batch": (loss, model, np.asarray(x)),
    }
    for name, (fn, *args) in calls.items():
        measured = rt.measure(fn, *args, target="cpu")
        found = (measured.argument_bytes, measured.temp_bytes, measured.output_bytes)
        assert found == (raw.argument_size_in_bytes, raw.temp_size_in_bytes, 4), name


MODEL = nnx.eval_shape(Tower)


def _loss_of_global(x):
    return loss(MODEL, x)


def test_a_global_model_is_found_and_its_gradient_measured():
    measured = rt.measure(_loss_of_global, inputs(), differentiate=True, target="cpu")
    parameters = sum(leaf.size * 4 for leaf in jax.tree.leaves(nnx.state(MODEL, nnx.Param)))
    assert parameters <= measured.output_bytes < parameters + 1000  # the CPU adds a table of pointers


def test_a_step_that_changes_its_model_counts_what_it_changed():
    class Counting(Tower):
        def __init__(self):
            super().__init__()
            self.calls = nnx.BatchStat(jnp.zeros((1000,)))

        def __call__(self, x):
            self.calls[...] += 1
            return super().__call__(x)

    model = Counting()
    plain = rt.measure(loss, Tower(), inputs(), target="cpu")
    counting = rt.measure(loss, model, inputs(), target="cpu")
    assert 4000 <= counting.output_bytes - plain.output_bytes < 4100
    assert float(model.calls[0]) == 0


def test_shardings_are_carried_to_the_targets_devices(tpu):
    target = rt.find_target(tpu)
    x = _make_abstract(512, 256)
    mesh = target.mesh((4,), ("data",))
    split = jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, PartitionSpec("data")))
    whole = rt.measure(_stack, _make_abstract(256, 256), x, target=tpu)
    quarter = rt.measure(_stack, _make_abstract(256, 256), split, target=tpu)
    assert quarter.flops < 0.3 * whole.flops


def test_running_out_of_memory_is_a_result(tpu):
    measured = rt.measure(_stack, _make_abstract(512, 512), _make_abstract(2**21, 512), differentiate=True, target=tpu)
    refused = measured.out_of_memory
    assert not measured.fits
    assert refused.limit_bytes > 15 * 2**30
    assert refused.excess_bytes == refused.needed_bytes - refused.limit_bytes > 0
    assert "needs" in str(measured)
    assert rt.measure(_stack, _make_abstract(8, 8), _make_abstract(8, 8), target=tpu).fits  # control


@pytest.mark.parametrize(
    ("call", "error", "fix"),
    [
        pytest.param(lambda: rt.measure(3), rt.MeasureError, "the function first", id="not a function"),
        pytest.param(
            lambda: rt.measure(lambda x: x, _make_abstract(2), differentiate=True),
            rt.MeasureError,
            "return a loss",
            id="not a scalar",
        ),
        pytest.param(
            lambda: rt.measure(lambda x: x.sum(), jnp.ones(3, int), differentiate=True),
            rt.MeasureError,
            "pass the model",
            id="nothing to differentiate",
        ),
        pytest.param(
            lambda: rt.measure(_stack, _make_abstract(8, 8), _make_abstract(8, 8), run=True),
            rt.MeasureError,
            "build",
            id="abstract",
        ),
        pytest.param(
            lambda: rt.measure(_stack, jnp.ones((8, 8)), _make_deleted(8, 8), run=True),
            rt.MeasureError,
            "what that step returned",
            id="deleted",
        ),
        pytest.param(
            lambda: rt.measure(_stack, jnp.ones((8, 8)), jnp.ones((8, 8)), run=True, repeats=0),
            rt.MeasureError,
            "repeats=10",
            id="no repeats",
        ),
    ],
)
def test_calls_that_cannot_be_measured_raise_with_a_fix(call, error, fix):
    with pytest.raises(error) as caught:
        call()
    assert fix in caught.value.fix


def test_user_errors_keep_their_type_and_name_the_call():
    with pytest.raises(ZeroDivisionError) as caught:
        rt.measure(lambda x: 1 / 0, jnp.ones(3))
    assert "remattools traced the call <lambda>(x=float32[3])." in caught.value.__notes__


@pytest.mark.parametrize("analyse", [rt.residuals, functools.partial(rt.measure, target="cpu"), rt.timeline])
@pytest.mark.parametrize("fn", [pytest.param(loss, id="plain"), pytest.param(nnx.jit(loss), id="jitted")])
def test_swapped_arguments_raise_with_the_right_order(analyse, fn):
    model, x = nnx.eval_shape(Tower), inputs()
    with pytest.raises(rt.MeasureError, match=r"loss\(model=float32\[4,6,8\], .*Tower") as caught:
        analyse(fn, x, model)
    assert "loss(model" in caught.value.fix
    with pytest.raises(rt.MeasureError, match="the model Tower was passed as the function, and loss as its argument"):
        analyse(model, fn, x)
    with pytest.raises(rt.MeasureError, match="missing a required argument: 'model'"):
        analyse(fn)
    analyse(fn, model, x)  # control


def test_a_model_may_take_a_function_as_input():
    class Acting(Tower):
        def __call__(self, x, function):
            return function(super().__call__(x))

    assert rt.measure(nnx.eval_shape(Acting), inputs(), jnp.sin, target="cpu").flops > 0
