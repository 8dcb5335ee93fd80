# SPDX-License-Identifier: Apache-2.0
"""Timed runs: what they add to a measurement, and what cannot be run."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import remattools as rt
from tests.remattools.models import Tower, inputs, loss


def _square(x):
    return jnp.sum(x @ x)


def test_a_run_is_timed_and_changes_nothing():
    class Counting(Tower):
        def __init__(self):
            super().__init__()
            self.calls = nnx.BatchStat(jnp.zeros(()))

        def __call__(self, x):
            self.calls[...] += 1
            return super().__call__(x)

    model, x = Counting(), inputs()
    measured = rt.measure(nnx.jit(loss, donate_argnums=0), model, x, run=True, repeats=3, target="cpu")
    assert measured.step_s > 0
    assert measured.step_spread_s >= 0
    assert measured.allocator_peak_bytes is None  # the CPU's allocator does not count
    assert float(model.calls[...]) == 0
    assert rt.measure(loss, model, x, target="cpu").step_s is None  # control


@pytest.mark.parametrize(
    ("options", "expected_fix"),
    [
        pytest.param({}, "build the model", id="abstract argument"),
        pytest.param({"x": jnp.ones((8, 8)), "repeats": 0}, "repeats=10", id="without repeats"),
        pytest.param({"x": jnp.ones((8, 8)), "repeats": True}, "repeats=10", id="repeats is a bool"),
    ],
)
def test_calls_that_cannot_be_run_raise_with_a_fix(options, expected_fix):
    options = dict(options)
    x = options.pop("x", jax.ShapeDtypeStruct((8, 8), jnp.float32))
    with pytest.raises(rt.MeasureError) as caught:
        rt.measure(_square, x, run=True, target="cpu", **options)
    assert expected_fix in caught.value.fix


def test_a_topology_cannot_run_a_program(tpu):
    with pytest.raises(rt.MeasureError) as caught:
        rt.measure(_square, jnp.ones((8, 8)), run=True, target=tpu)
    assert "estimated_cycles" in caught.value.fix
