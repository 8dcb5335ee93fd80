# SPDX-License-Identifier: Apache-2.0
"""The time model: cycles of operations, of recomputation and of transfers to the host."""

import dataclasses

import numpy as np
import pytest

from remattools.planner.model.dataflow_graph import Graph
from remattools.planner.model.op_work import Step, Work, WorkKind
from remattools.planner.model.time import (
    Rates,
    count_cycles,
    count_plain_cycles,
    get_rates,
    mark_recomputed_outputs,
    predict_link_cycles,
    predict_recompute_cycles,
)

RATES = Rates(matrix_flops=10, vector_flops=2, traffic_bytes=4, overhead=100, link_bytes=5)


def graph_with(*steps: Step) -> Graph:
    return Graph(
        forward=steps,
        backward=(),
        bytes=(40, 80),
        inputs=frozenset({0}),
        outputs=frozenset({1}),
        residuals=frozenset(),
    )


@pytest.mark.parametrize(
    ("kind", "flops", "cycles"),
    [
        pytest.param("matrix", 1000, 1000 / 10 + 100, id="limited by arithmetic"),
        pytest.param("matrix", 1, (40 + 80) / 4 + 100, id="limited by traffic"),
        pytest.param("elementwise", 200, 200 / 2, id="element-wise, without overhead"),
        pytest.param("free", 0, 0, id="change of shape"),
    ],
)
def test_an_operation_takes_its_arithmetic_or_its_traffic(kind: WorkKind, flops: float, cycles: float) -> None:
    step = Step((0,), (1,), Work(kind, flops))
    assert count_cycles(graph_with(step), step, RATES) == cycles
    repeated = dataclasses.replace(step, iterations=3)
    assert count_cycles(graph_with(repeated), repeated, RATES) == 3 * cycles


def test_plain_cycles_are_blocks_and_what_is_around_them() -> None:
    block, other = Step((0,), (1,), Work("other", 0.0), tag=("forward", 0)), Step((0,), (1,), Work("elementwise", 200))
    assert count_plain_cycles(graph_with(block, other), [1000.0, 20.0], RATES) == 1000 + 20 + 100


def test_only_the_last_block_of_a_group_keeps_outputs() -> None:
    mask = mark_recomputed_outputs([[0, 1, 2], [4, 5]], 6)
    assert mask.tolist() == [1, 1, 0, 0, 1, 0]
    cycles, outputs = np.ones((6, 4)), np.full(6, 10.0)
    assert predict_recompute_cycles(cycles, outputs) == 24
    assert predict_recompute_cycles(cycles, outputs, mask) == 24 + 30


def test_transfers_cost_only_what_computation_does_not_hide() -> None:
    nothing, recomputed = np.zeros(2), np.array([[2.0, 0, 0, 0], [0, 0, 0, 0]])
    moved, forward, backward = np.array([100.0, 0.0]), np.array([15.0, 0.0]), np.array([10.0, 0.0])
    # 100 bytes take 20 cycles each way: 5 more than the forward pass, 8 more than the backward pass.
    assert predict_link_cycles(moved, forward, backward, recomputed, RATES) == 5 + 8
    assert predict_link_cycles(moved, forward + 5, backward + 8, recomputed, RATES) == 0
    assert predict_link_cycles(nothing, nothing, nothing, recomputed, RATES) == 0


def test_an_unknown_tpu_gets_the_rates_of_a_v5e() -> None:
    assert get_rates("tpu:v99:2x2") == get_rates("tpu:v5e:2x2") != get_rates("tpu:v4:2x2")
    assert get_rates("gpu").link_bytes > get_rates("cpu").link_bytes == 0
