# SPDX-License-Identifier: Apache-2.0
"""The memory model: live bytes within a graph, and the peak of a program over its moments."""

from typing import Any

import numpy as np
import pytest

from remattools.planner.model.block_ilp import BlockProblem
from remattools.planner.model.dataflow_graph import Graph
from remattools.planner.model.memory import (
    Timetable,
    VisitMemory,
    build_timetable,
    compute_boundary_bytes,
    compute_group_memory,
    compute_live_bytes,
    predict_peak,
)
from remattools.planner.model.op_work import Step, Work
from remattools.planner.model.time import get_rates

from ...models import Tower
from ..spaces import space_of
from .test_dataflow_graph import VALUE, block, graph_of

# Two visits: forward 0, forward 1, backward 1, backward 0, with 10 bytes around them.
FORWARD, BACKWARD = (
    np.array(rows, bool) for rows in ([[1, 0], [0, 1], [0, 0], [0, 0]], [[0, 0], [0, 0], [0, 1], [1, 0]])
)
TABLE = Timetable(
    around_bytes=np.full(4, 10.0),
    saved_copies=np.array([[0.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 0.0]]),
    runs_forward=FORWARD,
    runs_backward=BACKWARD,
)


def visits(**changes: Any) -> VisitMemory:
    needs = {"saved_bytes": 100.0, "forward_bytes": 1.0, "backward_bytes": 7.0, "plain_saved_bytes": 100.0} | changes
    return VisitMemory(**{name: np.full(2, value) for name, value in needs.items()})


def chain(*sizes: int) -> Graph:
    """Each step reads what the step before it wrote; the first reads an input."""
    steps = [Step((number,), (number + 1,), Work("matrix", 1.0)) for number in range(len(sizes))]
    return Graph(
        forward=tuple(steps),
        backward=(),
        bytes=(1000, *sizes),
        inputs=frozenset({0}),
        outputs=frozenset(),
        residuals=frozenset(),
    )


def test_values_are_live_from_write_to_last_read() -> None:
    graph = chain(5, 7, 11)
    assert compute_live_bytes(graph, graph.forward) == [5, 12, 18]
    assert compute_live_bytes(graph, graph.forward, live_at_end=[1]) == [5, 12, 23]
    assert compute_live_bytes(graph, graph.forward[1:], live_at_start=[1]) == [12, 18]


def test_a_fused_operation_reads_when_its_reader_runs() -> None:
    """The backward pass reads `cos` of a product, which is fused: the product itself has to stay live."""
    graph = graph_of(block)
    live_bytes = compute_live_bytes(graph, (*graph.forward, *graph.backward))
    assert live_bytes[len(graph.forward)] >= 2 * VALUE  # the product, and `sin` of it, which another product reads


def test_the_peak_adds_up_what_is_live_at_its_moment() -> None:
    peak = predict_peak(TABLE, visits())
    assert (peak.bytes, peak.held_bytes) == (10 + 100 + 7, 0)  # the backward pass of visit 1, with visit 0 saved
    assert predict_peak(TABLE, visits(saved_bytes=0.0)).bytes == 10 + 7


def test_offloaded_values_take_room_only_while_their_layer_runs() -> None:
    offloaded = visits().offload(np.array([True, False]))
    assert offloaded.saved_bytes.tolist() == [0, 100]
    assert offloaded.forward_bytes.tolist() == [101, 1]
    assert predict_peak(TABLE, offloaded).bytes == 10 + 107  # the backward pass of visit 0
    assert predict_peak(TABLE, visits().offload(np.zeros(2, bool))).bytes == predict_peak(TABLE, visits()).bytes


def test_a_group_drops_inner_inputs_and_holds_what_it_recomputed() -> None:
    groups = compute_group_memory(TABLE, [[0, 1]], boundary_bytes=[3, 4])
    assert groups.dropped_bytes.tolist() == [0, 0, 0, 0]  # the backward pass follows directly on visit 1
    assert groups.held_mask.tolist() == [[0, 0], [0, 0], [1, 0], [0, 0]]
    peak = predict_peak(TABLE, visits(saved_bytes=20.0), groups)
    assert (peak.bytes, peak.held_bytes) == (10 + 20 + 7 + 80, 80)  # what the plain block saves, minus what is saved
    assert predict_peak(TABLE, visits(saved_bytes=20.0)).bytes == 10 + 20 + 7  # control


def test_a_timetable_has_one_moment_per_pass_and_block() -> None:
    _, space = space_of(lambda: Tower(3), (4, 6, 8))
    outline = space.outline
    table = build_timetable(outline.around, outline.calls)
    assert table.runs_forward.sum(axis=0).tolist() == table.runs_backward.sum(axis=0).tolist() == [1, 1, 1]
    assert table.saved_copies.max(axis=0).tolist() == [1, 1, 1]
    assert not (table.saved_copies.astype(bool) & (table.runs_forward | table.runs_backward)).any()


def test_only_the_next_block_reads_a_blocks_output() -> None:
    _, space = space_of(lambda: Tower(3), (4, 6, 8))
    assert compute_boundary_bytes(space.outline.around, space.outline.calls) == (0, 4 * 6 * 8 * 4, 4 * 6 * 8 * 4)


@pytest.mark.parametrize("name", [".:dot_general[0]", ".:sin[0]"])
def test_recomputed_values_are_live_only_where_they_are_needed(name: str) -> None:
    problem = BlockProblem(graph_of(block), get_rates("cpu"))
    saved = set(problem.names[name])
    early = [*(step for step in problem.graph.forward if not saved.intersection(step.writes)), *problem.graph.backward]
    at_once = max(compute_live_bytes(problem.graph, early, live_at_start=saved))
    assert problem.make_choice((name,)).backward_bytes <= at_once
