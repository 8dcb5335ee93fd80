# SPDX-License-Identifier: Apache-2.0
"""A measurement as a value: what it prints, and how it is stored."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest

import remattools as rt
from remattools.compiler.hlo.live_buffers import LiveBuffer
from remattools.compiler.out_of_memory import Allocation, OutOfMemory
from remattools.compiler.report import Measurement, read_measurement

MEASUREMENT = Measurement(
    target="gpu", argument_bytes=4096, output_bytes=1024, alias_bytes=1024, temp_bytes=2048, peak_bytes=6144
)


def _stack(weights, x):
    for _ in range(4):
        x = jnp.sin(jnp.cos(x @ weights) @ weights)
    return jnp.mean(x**2)


def test_the_total_counts_a_donated_result_once():
    assert MEASUREMENT.total_bytes == 4096 + 2048
    assert dataclasses.replace(MEASUREMENT, alias_bytes=0).total_bytes == 4096 + 2048 + 1024


def test_data_for_json_gives_the_measurement_back():
    largest = (Allocation(path="a", name="b", shape="c", bytes=2),)
    reason = OutOfMemory(needed_bytes=2, limit_bytes=1, message="m", largest=largest)
    for measurement in (MEASUREMENT, dataclasses.replace(MEASUREMENT, out_of_memory=reason, notes=("n",))):
        assert Measurement.from_dict(json.loads(json.dumps(measurement.as_dict()))) == measurement


def test_repr_leaves_out_what_was_not_measured():
    assert "temp_bytes=2048" in repr(MEASUREMENT)
    assert "step_s" not in repr(MEASUREMENT)
    assert "step_s=0.5" in repr(dataclasses.replace(MEASUREMENT, step_s=0.5))
    assert eval(repr(MEASUREMENT), {"Measurement": Measurement}) == MEASUREMENT


def test_a_peak_without_temporaries_is_marked():
    assert "without temporaries" not in str(MEASUREMENT)
    assert "without temporaries" in str(dataclasses.replace(MEASUREMENT, target="cpu"))


def test_an_out_of_memory_report_names_excess_and_largest_values():
    largest = (Allocation(path="layers.0", name="sin", shape="float32[8]", bytes=2048, count=3),)
    reason = OutOfMemory(needed_bytes=3 * 2**30, limit_bytes=2**30, message="m", largest=largest)
    text = str(dataclasses.replace(MEASUREMENT, out_of_memory=reason))
    assert "OUT OF MEMORY: needs 3.0 GiB of 1.0 GiB, 2.0 GiB too much" in text
    assert "layers.0  sin  float32[8] x3" in text
    unknown = OutOfMemory(needed_bytes=None, limit_bytes=None, message="the compiler's words")
    assert "the compiler's words" in str(dataclasses.replace(MEASUREMENT, out_of_memory=unknown))


def test_temporaries_in_on_chip_memory_are_reported(tpu):
    weights = jax.ShapeDtypeStruct((256, 256), jnp.float32)
    small, large = (
        rt.measure(_stack, weights, jax.ShapeDtypeStruct((n, 256), jnp.float32), differentiate=True, target=tpu)
        for n in (512, 65536)
    )
    assert small.temporaries_on_chip
    assert small.temp_bytes == 0 < small.total_bytes < small.peak_bytes
    assert "on-chip" in str(small)
    assert not large.temporaries_on_chip
    assert large.temp_bytes > 0
    assert "on-chip" not in str(large)


class _FakeCompiled:
    def __init__(self, compiled, estimate):
        self.compiled, self.estimate = compiled, estimate

    def as_text(self):
        cost = f'%cost = f32[] constant(0), backend_config={{"estimated_cycles":"{self.estimate}"}}'
        return self.compiled.as_text().replace("ROOT", f"{cost}\n  ROOT", 1)

    def __getattr__(self, name):
        return getattr(self.compiled, name)


@pytest.mark.parametrize(("estimate", "cycles"), [(2**63 - 1, None), (7, 7)], ids=["sentinel", "control"])
def test_cycles_with_a_sentinel_are_unknown(estimate, cycles):
    compiled = jax.jit(jnp.sin).lower(jnp.ones(8)).compile()
    target = rt.find_target("cpu")
    measured = read_measurement(
        _FakeCompiled(compiled, estimate), dataclasses.replace(target, platform="tpu", name="tpu:v5e:2x2"), 0.0
    )
    assert measured.estimated_cycles == cycles
    assert ("no estimate" in str(measured)) is (cycles is None)
    assert str(2**63 - 1) not in str(measured)


def test_fragmentation_is_what_a_tpu_counts_beyond_its_peak():
    tpu = dataclasses.replace(MEASUREMENT, target="tpu:v5e:2x2", peak_bytes=5644)
    assert (tpu.total_bytes, tpu.fragmentation_bytes, tpu.unexplained_bytes) == (6144, 500, 1548)
    assert MEASUREMENT.fragmentation_bytes == 0


def test_too_many_live_buffers_count_against_the_share():
    def share(size):
        row = LiveBuffer(path=".", operation="sin", phase="forward", shape="f32[1]", bytes=size)
        return dataclasses.replace(MEASUREMENT, live=(row,)).explained_share

    assert (share(2048), share(1024), share(3072)) == (1.0, 0.5, 0.5)


@pytest.mark.parametrize(
    ("target", "peak", "host", "device"),
    [
        pytest.param("tpu:v5e:2x2", 184, 128, 56, id="host-at-the-peak"),
        pytest.param("tpu:v5e:2x2", 130, 128, 42, id="device-peak-at-another-moment"),
        pytest.param("tpu:v5e:2x2", 88, 0, 88, id="control-nothing-on-the-host"),
        pytest.param("gpu", 88, 20, 88, id="control-other-target"),
    ],
)
def test_the_device_peak_leaves_host_memory_out(target, peak, host, device):
    measurement = Measurement(
        target=target,
        argument_bytes=12,
        output_bytes=12,
        alias_bytes=0,
        temp_bytes=18,
        peak_bytes=peak,
        host_temp_bytes=host,
    )
    assert measurement.device_peak_bytes == device
