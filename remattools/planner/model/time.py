# SPDX-License-Identifier: Apache-2.0
"""The planner's time model: cycles of operations, of recomputation and of transfers to the host.

Sits on `dataflow_graph`. Used to search, never reported as a measurement: the search corrects its predictions by the
compiler's own cycles wherever there are any.

An operation takes the longer of its arithmetic and its memory traffic, plus an overhead. Element-wise operations that
are fused into their readers cause no traffic, but their arithmetic counts.
"""

import dataclasses
import functools
from collections.abc import Iterable, Sequence

import numpy as np

from .dataflow_graph import Graph
from .op_work import Step


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rates:
    """What a target does in one cycle.

    Attributes:
        matrix_flops: Floating-point operations of its matrix units.
        vector_flops: Floating-point operations of its other units.
        traffic_bytes: Bytes read from and written to its main memory.
        overhead: Cycles to start an operation.
        link_bytes: Bytes to the host's memory, and as many from it at the same time; 0 without host memory.
        fuses_products: Whether the compiler computes what a single product reads within that product, and stores in
            half the bytes what only products read, as the matrix units take float32 as bfloat16 by default.
        redraw_buffers: How many buffers of the size of random bits the compiler may hold while a region draws them
            again from threefry keys.
        has_cpu_kernels: Whether the compiler is XLA's for CPUs, which `cpu_kernels` describes.
    """

    matrix_flops: float
    vector_flops: float
    traffic_bytes: float
    overhead: float
    link_bytes: float = 0.0
    fuses_products: bool = False
    redraw_buffers: int = 0
    has_cpu_kernels: bool = False


# Peak rates of one chip from the vendors' data sheets, divided by its clock. They do not give the link to the host:
# assumed is PCIe 3.0 (TPUs) and 5.0 (GPUs) with 16 lanes, 15.75e9 and 63e9 bytes a second.
# The buffers are the most that was measured (v5e): of the bits of one region. Other programs had none.
_make_tpu_rates = functools.partial(Rates, overhead=300, fuses_products=True, redraw_buffers=30)
_TPU_RATES = {
    "v4": _make_tpu_rates(matrix_flops=262_144, vector_flops=8_192, traffic_bytes=1_143, link_bytes=15.0),
    "v5e": _make_tpu_rates(matrix_flops=131_072, vector_flops=4_096, traffic_bytes=546, link_bytes=10.5),
    "v5p": _make_tpu_rates(matrix_flops=262_144, vector_flops=8_192, traffic_bytes=1_580, link_bytes=9.0),
    "v6e": _make_tpu_rates(matrix_flops=524_288, vector_flops=8_192, traffic_bytes=937, link_bytes=9.0),
}
_GPU_RATES = Rates(matrix_flops=500_000, vector_flops=34_000, traffic_bytes=1_900, overhead=3_000, link_bytes=36.0)
_CPU_RATES = Rates(matrix_flops=64, vector_flops=16, traffic_bytes=8, overhead=500, has_cpu_kernels=True)


def get_rates(target_name: str) -> Rates:
    """Return the rates of a target by its name; an unknown TPU gets those of a v5e."""
    platform, _, topology = target_name.partition(":")
    if platform == "tpu":
        return _TPU_RATES.get(topology.partition(":")[0], _TPU_RATES["v5e"])
    return _GPU_RATES if platform == "gpu" else _CPU_RATES


def count_cycles(graph: Graph, step: Step, rates: Rates) -> float:
    """Return the cycles of one step of a graph, all its iterations together."""
    if step.work.kind == "free":
        return 0.0
    rate = rates.matrix_flops if step.work.kind in ("matrix", "other") else rates.vector_flops
    arithmetic = step.work.flops / rate
    if step.work.kind == "elementwise" and all(value in graph.fused_values for value in step.writes):
        return step.iterations * arithmetic
    sources = frozenset[int]().union(*(graph.memory_sources.get(value, frozenset((value,))) for value in step.reads))
    moved = graph.count_bytes(sources) + graph.count_bytes(
        value for value in step.writes if value not in graph.fused_values
    )
    overhead = 0.0 if step.work.kind == "elementwise" else rates.overhead
    return step.iterations * (max(arithmetic, moved / rates.traffic_bytes) + overhead)


def count_total_cycles(graph: Graph, rates: Rates) -> float:
    """Return the cycles of both passes of a graph, without recomputation."""
    return sum(count_cycles(graph, step, rates) for step in (*graph.forward, *graph.backward))


def count_plain_cycles(around: Graph, block_cycles: Iterable[float], rates: Rates) -> float:
    """Return the cycles of a whole program without regions.

    Args:
        around: The program with its blocks as single steps, which have a tag.
        block_cycles: Of each call of a block, both passes and all iterations together.
        rates: Of the target.
    """
    return sum(block_cycles) + sum(count_cycles(around, step, rates) for step in around.forward if step.tag is None)


def mark_recomputed_outputs(groups: Iterable[Sequence[int]], num_visits: int) -> np.ndarray:
    """Return 1 for each visit whose outputs its group recomputes, shape (visits,).

    A group recomputes each of its blocks up to the outputs, because the next block of the group reads them; the last
    block only as far as its own backward pass reads.

    Args:
        groups: For each group its visits, in the order of the forward pass.
        num_visits: How many visits there are.
    """
    mask = np.zeros(num_visits)
    for group in groups:
        mask[group[:-1]] = 1.0
    return mask


def predict_recompute_cycles(
    recompute_cycles: np.ndarray, output_cycles: np.ndarray, outputs_mask: np.ndarray | None = None
) -> float:
    """Return the cycles of all recomputation.

    Args:
        recompute_cycles: What each visit recomputes for its own backward pass, by kind of work, shape (visits, kinds).
        output_cycles: What recomputing its outputs takes in addition, shape (visits,).
        outputs_mask: 1 where the outputs are recomputed, from `mark_recomputed_outputs`; None where nothing is grouped.
    """
    total = float(recompute_cycles.sum())
    if outputs_mask is not None:
        total += float(outputs_mask @ output_cycles)
    return total


def predict_link_cycles(
    moved_bytes: np.ndarray,
    forward_cycles: np.ndarray,
    backward_cycles: np.ndarray,
    recompute_cycles: np.ndarray,
    rates: Rates,
) -> float:
    """Return the cycles of transfers to the host and back beyond the computation that they overlap with.

    Args:
        moved_bytes: What each visit offloads, shape (visits,); 0 for visits that offload nothing.
        forward_cycles: Of each visit's forward pass, which the transfer to the host overlaps with, shape (visits,).
        backward_cycles: Of each visit's backward pass, which the transfer back overlaps with, shape (visits,).
        recompute_cycles: What each visit recomputes in its backward pass, by kind of work, shape (visits, kinds).
        rates: Of the target.
    """
    total = 0.0
    for size, forward, backward, recomputed in zip(
        moved_bytes, forward_cycles, backward_cycles, recompute_cycles, strict=True
    ):
        if size:
            for overlapped in (forward, backward + recomputed.sum()):
                total += max(0.0, size / rates.link_bytes - overlapped)
    return total
