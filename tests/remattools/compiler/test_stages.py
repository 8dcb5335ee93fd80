# SPDX-License-Identifier: Apache-2.0
"""Programs that are traced, lowered or compiled already are measured as they are, and refused where rules apply."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import remattools as rt
from remattools.tracing.call_errors import is_stage
from tests.remattools.models import Tower, inputs, loss


def _square(x):
    return jnp.sin(x @ x).sum()


X = jax.ShapeDtypeStruct((64, 64), jnp.float32)


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: jax.jit(_square).trace(X), id="traced"),
        pytest.param(lambda: jax.jit(_square).lower(X), id="lowered"),
        pytest.param(lambda: jax.jit(_square).lower(X).compile(), id="compiled"),
    ],
)
def test_a_stage_measures_as_its_function(make):
    measured, expected = rt.measure(make()), rt.measure(_square, X, target="cpu")
    assert (measured.temp_bytes, measured.argument_bytes, measured.flops) == (
        expected.temp_bytes,
        expected.argument_bytes,
        expected.flops,
    )
    assert measured.target == "cpu"


def test_a_stage_of_nnx_measures_as_its_function():
    model, x = Tower(), inputs()
    expected = rt.measure(nnx.jit(loss), model, x, target="cpu")
    for stage in (nnx.jit(loss).lower(model, x), nnx.jit(loss).lower(model, x).compile()):
        assert rt.measure(stage, target="cpu").flops == expected.flops


def test_a_stage_is_found_in_the_cache(tmp_path):
    first = rt.measure(jax.jit(_square).lower(X), cache=tmp_path)
    assert rt.measure(jax.jit(_square).lower(X), cache=tmp_path) == first


def test_a_stage_that_runs_out_of_memory_is_a_result(tpu):
    target = rt.find_target(tpu)
    big = jax.ShapeDtypeStruct(
        (2**21, 1024), jnp.float32, sharding=jax.sharding.SingleDeviceSharding(target.devices[0])
    )
    lowered = jax.jit(lambda x: jnp.sort(jnp.sin(x), axis=0)).trace(big).lower(lowering_platforms=("tpu",))
    measured = rt.measure(lowered)
    assert measured.out_of_memory.excess_bytes > 0
    assert measured.target == "tpu:v5e"
    assert rt.measure(lowered, target=tpu).target == tpu


def test_functions_and_models_are_not_stages():
    assert not any(map(is_stage, (_square, jax.jit(_square), nnx.jit(loss), Tower(), jax.stages.Lowered)))


LOWERED = jax.jit(_square).lower(X)


@pytest.mark.parametrize(
    ("call", "fix"),
    [
        pytest.param(lambda: rt.measure(LOWERED, X), "measure(fn, *args)", id="arguments"),
        pytest.param(lambda: rt.measure(LOWERED, differentiate=True), "measure(fn, *args)", id="gradient"),
        pytest.param(lambda: rt.measure(LOWERED, run=True), "measure(fn, *args)", id="run"),
        pytest.param(lambda: rt.compare(LOWERED, candidates={"a": "nothing_saveable"}), "the function", id="compare"),
        pytest.param(lambda: rt.check(LOWERED, rules={"layers.*": "nothing_saveable"}), "the function", id="check"),
        pytest.param(lambda: rt.plan(LOWERED, Tower(), budget=0.5), "the function", id="plan"),
        pytest.param(lambda: rt.frontier(LOWERED, Tower()), "the function", id="frontier"),
        pytest.param(lambda: rt.residuals(LOWERED), "the function", id="residuals"),
        pytest.param(lambda: rt.timeline(LOWERED), "the function", id="timeline"),
        pytest.param(lambda: rt.explain(LOWERED, names=True), "the function", id="explain"),
    ],
)
def test_what_a_fixed_program_cannot_do_is_refused_with_a_fix(call, fix):
    with pytest.raises(rt.MeasureError) as caught:
        call()
    assert fix in caught.value.fix


def test_a_stage_of_another_target_is_refused(tpu):
    with pytest.raises(rt.MeasureError, match="lowered for cpu") as caught:
        rt.measure(LOWERED, target=tpu)
    assert "target=" in caught.value.fix
