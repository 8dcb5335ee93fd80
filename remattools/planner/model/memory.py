# SPDX-License-Identifier: Apache-2.0
"""The planner's memory model: which values are live at each moment of a program, and so its predicted peak.

Sits on `dataflow_graph` and `schedule`. Used to search; the compiler measures whatever is returned.

Within one graph (one block, or the program around the blocks) `compute_live_bytes` walks the operations in order.
Values that exist only inside fused operations take no memory.

Over the whole program only few moments can be the peak: those at which a block runs, and the fullest one between each
two of them. A `Timetable` lists them. At each moment these are live, and `predict_peak` adds them up:

-   the values around the blocks,
-   what each block has saved, from its forward to its backward pass,
-   what the block that runs at this moment needs in addition,
-   for groups: minus the inputs of inner blocks, plus what the group recomputed and still holds.

Offloading moves what a block has saved out of the device; while a block runs, its transfer needs that room once more.
"""

import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from .cpu_kernels import arrange_kernels
from .dataflow_graph import Graph
from .op_work import Access, Step
from .schedule import Visit


def compute_live_bytes(
    graph: Graph, order: Sequence[Step], live_at_start: Iterable[int] = (), live_at_end: Iterable[int] = ()
) -> list[int]:
    """Return the bytes of the values that are live in memory at each step, the graph's inputs and outputs apart.

    Where the graph has CPU kernels, there is one number for each kernel, in the order in which they run.

    Args:
        graph: Where the sizes are.
        order: The steps as they run.
        live_at_start: Values that are live from the start; they count until they are last read.
        live_at_end: Values that stay live until the end.
    """
    live_at_start, live_at_end = set(live_at_start), set(live_at_end)
    fused = graph.find_fused_values(order, live_at_start | live_at_end)
    uncounted = fused | graph.inputs | graph.outputs
    accesses = _compute_accesses(order, fused)
    if graph.has_cpu_kernels:
        accesses = arrange_kernels(order, accesses)
    last_use = {value: number for number, one in enumerate(accesses) for value in (*one.writes, *one.reads)}
    last_use.update(dict.fromkeys(live_at_end, len(order)))
    live = {value for value in live_at_start if value in last_use}
    total = graph.count_bytes(live)
    totals = []
    for number, (reads, writes, overwritable) in enumerate(accesses):
        for value in writes:
            if value not in live and value not in uncounted:
                dying = (v for v in overwritable if v in live and last_use[v] == number)
                overwritten = next((v for v in dying if graph.bytes[v] == graph.bytes[value]), None)
                if overwritten is not None:
                    live.remove(overwritten)
                    total -= graph.bytes[overwritten]
                live.add(value)
                total += graph.bytes[value]
        totals.append(total)
        for value in {*reads, *writes}:
            if value in live and last_use[value] <= number:
                live.remove(value)
                total -= graph.bytes[value]
    return totals


def _compute_accesses(order: Sequence[Step], fused_values: frozenset[int]) -> list[Access]:
    """Return what each step reads from memory and writes to it; a fused step reads when its readers run."""
    sources: dict[int, frozenset[int]] = {}
    accesses: list[Access] = []
    for step in order:
        reads = frozenset[int]().union(*(sources.get(value, frozenset((value,))) for value in step.reads))
        sources.update((value, reads if value in fused_values else frozenset((value,))) for value in step.writes)
        fused = bool(step.writes) and fused_values.issuperset(step.writes)
        accesses.append(Access(frozenset(), ()) if fused else Access(reads, step.writes))
    return accesses


def find_materialized_residuals(graph: Graph) -> frozenset[int]:
    """Return the values that the forward pass leaves in memory for the backward pass, if nothing is recomputed."""
    accesses = _compute_accesses((*graph.forward, *graph.backward), graph.fused_values)
    read = frozenset[int]().union(*(access.reads for access in accesses[len(graph.forward) :]))
    return read.intersection(graph.producers)


def compute_boundary_bytes(around: Graph, visits: Sequence[Visit]) -> tuple[int, ...]:
    """Return for each visit the bytes of its inputs that nothing else reads: live for its backward pass alone."""
    readers: dict[int, set[int]] = {}
    for number, step in enumerate(around.forward):
        reader = -1 - number if step.tag is None else step.tag[1]
        for value in step.reads:
            readers.setdefault(value, set()).add(reader)
    # What is added to the block's own output on the way (a residual stream) is read by the block alone.
    inputs = [around.forward[visit.forward].reads for visit in visits]
    return tuple(
        around.count_bytes(value for value in values if value in around.producers and readers[value] == {number})
        for number, values in enumerate(inputs)
    )


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Timetable:
    """The moments of a program that can be its peak.

    Attributes:
        around_bytes: Bytes that are live around the blocks at each moment, shape (moments,).
        saved_copies: How many copies of what each visit saves are live at each moment, shape (moments, visits): 0,
            1, or the iterations of a loop.
        runs_forward: Whether the visit's forward pass runs at the moment, shape (moments, visits).
        runs_backward: Whether its backward pass does, shape (moments, visits).
    """

    around_bytes: np.ndarray
    saved_copies: np.ndarray
    runs_forward: np.ndarray
    runs_backward: np.ndarray


def build_timetable(around: Graph, visits: Sequence[Visit]) -> Timetable:
    """Return the moments of a program that can be its peak.

    Args:
        around: The program with its blocks as single steps.
        visits: The calls of blocks in it.
    """
    order = around.forward
    live_bytes = compute_live_bytes(around, order)
    boundaries = {number for v in visits for number in (v.first, v.forward, v.backward, v.last)}
    chosen = {number for v in visits for number in (v.forward, v.backward)}
    for left, right in itertools.pairwise(sorted({*boundaries, 0, len(order)})):
        if left < right:  # between two blocks the same values stay saved: only the fullest moment matters
            chosen.add(max(range(left, right), key=lambda n: live_bytes[n] if order[n].tag is None else -1))
    moments = sorted(chosen)
    return Timetable(
        around_bytes=np.array([float(live_bytes[t]) for t in moments]),
        saved_copies=np.array([[float(v.copies * (v.first < t < v.last)) for v in visits] for t in moments]),
        runs_forward=np.array([[t == v.forward for v in visits] for t in moments]),
        runs_backward=np.array([[t == v.backward for v in visits] for t in moments]),
    )


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class VisitMemory:
    """What each visit needs under one assignment of choices, in bytes, shape (visits,) each.

    Attributes:
        saved_bytes: Live on the device from the forward to the backward pass; one copy.
        forward_bytes: The most that the forward pass needs in addition.
        backward_bytes: The most that the backward pass needs, recomputed and saved values included.
        plain_saved_bytes: What it would save without any region.
    """

    saved_bytes: np.ndarray
    forward_bytes: np.ndarray
    backward_bytes: np.ndarray
    plain_saved_bytes: np.ndarray

    def offload(self, mask: np.ndarray) -> "VisitMemory":
        """Return the same with the saved values of some visits in the host's memory.

        While one layer runs, the values of a neighbour are being transferred, so that they need room in both passes.

        Args:
            mask: Whether a visit's values are offloaded, shape (visits,).
        """
        moved = np.where(mask, self.saved_bytes, 0.0)
        return dataclasses.replace(
            self,
            saved_bytes=np.where(mask, 0.0, self.saved_bytes),
            forward_bytes=self.forward_bytes + moved,
            backward_bytes=self.backward_bytes + moved,
        )


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class GroupMemory:
    """What regions of several blocks change.

    Attributes:
        dropped_bytes: Bytes of inputs of inner blocks that are not live at each moment, shape (moments,).
        held_mask: 1 where a group holds what a visit's backward pass needs, shape (moments, visits).
        held_bytes: What a group of nested regions holds of each visit, shape (visits,): its input. None where the
            blocks of a group are not regions, so that it holds all that the plain blocks would save.
    """

    dropped_bytes: np.ndarray
    held_mask: np.ndarray
    held_bytes: np.ndarray | None = None


def compute_group_memory(
    timetable: Timetable, groups: Iterable[Sequence[int]], boundary_bytes: Sequence[int]
) -> GroupMemory:
    """Return what groups of visits change over time.

    Between the passes a group saves the input of its first block alone. In exchange it recomputes all of its blocks
    before the first of their backward passes, and holds what each needs until its backward pass is done.

    Args:
        timetable: Of the program.
        groups: For each group its visits, in the order of the forward pass.
        boundary_bytes: Of each visit, from `compute_boundary_bytes`.
    """
    num_moments, num_visits = timetable.saved_copies.shape
    backward = timetable.runs_backward
    forward_moments = timetable.runs_forward.argmax(axis=0)
    backward_moments = np.where(backward.any(axis=0), backward.argmax(axis=0), num_moments)
    dropped, held, time = np.zeros(num_moments), np.zeros((num_moments, num_visits)), np.arange(num_moments)
    for group in groups:
        start = backward_moments[group[-1]]  # the backward passes run from the last block to the first
        for visit in group:
            held[(time >= start) & (time < backward_moments[visit]), visit] = 1.0
        for visit in group[1:]:
            dropped[(time > forward_moments[visit]) & (time < start)] += boundary_bytes[visit]
    return GroupMemory(dropped_bytes=dropped, held_mask=held)


def nest_groups(
    timetable: Timetable,
    groups: GroupMemory,
    boundary_bytes: Sequence[int],
    stacks: Mapping[int, tuple[float, float]],
) -> GroupMemory:
    """Return what groups change whose blocks are regions too, groups of the iterations of loops included.

    Args:
        timetable: Of the program.
        groups: From `compute_group_memory`, the groups of blocks in lists.
        boundary_bytes: Of each visit, from `compute_boundary_bytes`.
        stacks: For visits inside loops the bytes of inputs that are not saved, and that a group holds while it runs
            backward.
    """
    dropped, mask, held = groups.dropped_bytes.copy(), groups.held_mask.copy(), np.array(boundary_bytes, float)
    for visit, (dropped_bytes, held_bytes) in stacks.items():
        dropped[timetable.saved_copies[:, visit] > 0] += dropped_bytes
        mask[:, visit] = timetable.runs_backward[:, visit]
        held[visit] = held_bytes
    return GroupMemory(dropped_bytes=dropped, held_mask=mask, held_bytes=held)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Peak:
    """A predicted peak.

    Attributes:
        bytes: Live bytes at the fullest moment, the program's arguments and results apart.
        held_bytes: The most that groups hold for backward passes still to come; 0 without groups.
    """

    bytes: float
    held_bytes: float


def predict_peak(timetable: Timetable, visits: VisitMemory, groups: GroupMemory | None = None) -> Peak:
    """Return the predicted peak of a program.

    Args:
        timetable: The moments that can be the peak.
        visits: What each visit needs.
        groups: What grouping changes; None where nothing is grouped.
    """
    live_bytes = (
        timetable.around_bytes
        + timetable.saved_copies @ visits.saved_bytes
        + timetable.runs_forward @ visits.forward_bytes
        + timetable.runs_backward @ visits.backward_bytes
    )
    if groups is None:
        return Peak(bytes=float(live_bytes.max()), held_bytes=0.0)
    # A recomputed block holds what the plain block would save, minus what it has saved anyway.
    each = np.maximum(visits.plain_saved_bytes - visits.saved_bytes, 0.0)
    held_bytes = groups.held_mask @ (each if groups.held_bytes is None else groups.held_bytes)
    live_bytes = live_bytes - groups.dropped_bytes + held_bytes
    return Peak(bytes=float(live_bytes.max()), held_bytes=float(held_bytes.max()))
