# SPDX-License-Identifier: Apache-2.0
"""What the memory of two programs says about rules."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

import remattools as rt
from remattools.analysis.findings import ProgramMemory, find_problems

CPU = rt.find_target("cpu")


@pytest.fixture(scope="module")
def measured():
    return rt.measure(lambda x: jnp.sum(jnp.sin(x) ** 2), jax.ShapeDtypeStruct((64,), jnp.float32), target=CPU)


def _make_memory(measured, residual_bytes, temp_bytes, host_bytes=0):
    measurement = dataclasses.replace(measured, temp_bytes=temp_bytes, peak_bytes=2 * temp_bytes)
    return ProgramMemory(residual_bytes, host_bytes, residual_bytes, measurement)


@pytest.mark.parametrize(
    ("ruled", "regions", "codes"),
    [
        pytest.param((100, 500), 1, [], id="control, as much is freed as should be"),
        pytest.param((100, 500), 0, ["no_region"], id="no region"),
        pytest.param((1000, 1000), 1, ["nothing_freed"], id="as much is saved"),
        pytest.param((100, 990), 1, ["undone"], id="the compiler frees nothing"),
        pytest.param((100, 500, 50), 1, ["offload_ignored"], id="no host memory is used"),
    ],
)
def test_problems_follow_from_the_memory_of_both_programs(measured, ruled, regions, codes):
    found = find_problems(_make_memory(measured, 1000, 1000), _make_memory(measured, *ruled), regions, CPU)
    assert [finding.code for finding in found] == codes
