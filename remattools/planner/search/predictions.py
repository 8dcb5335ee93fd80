# SPDX-License-Identifier: Apache-2.0
"""Predicted bytes and cycles of every assignment, and the features by which these predictions may be wrong.

Sits on `assignments`; applies `model.memory` and `model.time` to each of them. Predictions only order the search.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ..model.block_groups import Grouping
from ..model.block_ilp import WORK_KINDS, Choice
from ..model.memory import (
    GroupMemory,
    VisitMemory,
    build_timetable,
    compute_boundary_bytes,
    compute_group_memory,
    nest_groups,
    predict_peak,
)
from ..model.outline import Outline
from ..model.time import mark_recomputed_outputs, predict_link_cycles, predict_recompute_cycles
from .assignments import Assignment, Level, is_exhaustive

# What one visit costs with one choice, all in float64: memory for one copy, cycles for all iterations.
_VISIT_COST = np.dtype(
    [
        ("saved_bytes", float),  # saved from the forward to the backward pass
        ("forward_bytes", float),  # needed by the forward pass in addition
        ("backward_bytes", float),  # needed by the backward pass, saved and recomputed values included
        ("recompute_cycles", float, (len(WORK_KINDS),)),  # by kind of work
        ("bytes_without_region", float),  # `saved_bytes` of a block without a region, else 0
        ("is_without_region", float),  # 1 for a block without a region, else 0
        ("output_cycles", float),  # cycles to recompute the outputs in addition
    ]
)


class _Features(NamedTuple):
    """What a prediction may be wrong in, one number each.

    Attributes:
        saved_bytes: All that is saved, one copy for each visit.
        unnamed_bytes: What is saved without names: by blocks without a region, or while a group recomputes.
        backward_bytes: The most that one backward pass needs.
        matrix_cycles: Recomputed matrix products.
        reduction_cycles: Recomputed reductions.
        elementwise_cycles: Recomputed element-wise operations.
        other_cycles: Everything else that is recomputed.
        visits_without_region: Number of visits without a region.
        group_cycles: What groups recompute in addition.
        offloaded_bytes: Bytes moved to the host and back.
    """

    saved_bytes: float
    unnamed_bytes: float
    backward_bytes: float
    matrix_cycles: float
    reduction_cycles: float
    elementwise_cycles: float
    other_cycles: float
    visits_without_region: float
    group_cycles: float
    offloaded_bytes: float


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Predictions:
    """What the planner's model predicts for each assignment.

    Attributes:
        bytes: The peak without the program's arguments and results, shape (assignments,).
        cycles: Cycles beyond those of the plain model, `link_cycles` included, shape (assignments,).
        link_cycles: Cycles that transfers to the host and back take beyond what they overlap with, shape
            (assignments,). By the model alone, since compilers do not count them.
        features: One row of `_Features` for each assignment, each column at most 1 in size.
        name_shares: In what part of the visits each name of each kind of block is saved, shape (assignments, names);
            None where names are many. A compiler may need more memory for a block that saves more, or less: where all
            subsets of few names are tried, the measurements show it name by name.
    """

    bytes: np.ndarray
    cycles: np.ndarray
    link_cycles: np.ndarray
    features: np.ndarray
    name_shares: np.ndarray | None


def predict_assignments(
    outline: Outline,
    levels: Sequence[Level],
    assignments: Sequence[Assignment],
    *,
    grouping: Grouping,
    members: np.ndarray,
) -> Predictions:
    """Predict bytes and cycles of assignments.

    Args:
        outline: The outline.
        levels: Its levels.
        assignments: The assignments.
        grouping: The groups that it allows.
        members: For each visit the number of its block, shape (visits,).
    """
    predictor = _Predictor(outline, levels, grouping, members)
    rows = [predictor.predict(assignment) for assignment in assignments]
    features = np.array([row.features for row in rows])
    # What the search learns of other assignments must not depend on whether offloading is tried.
    scale = np.abs(features)[[not assignment.offload for assignment in assignments]].max(axis=0)
    scale[-1] = features[:, -1].max()
    return Predictions(
        bytes=np.array([row.bytes for row in rows]),
        cycles=np.array([row.cycles for row in rows]),
        link_cycles=np.array([row.link_cycles for row in rows]),
        features=features / np.where(scale > 0, scale, 1.0),
        name_shares=_compute_name_shares(outline, levels, assignments, members),
    )


@dataclasses.dataclass(frozen=True)
class _Row:
    bytes: float
    cycles: float
    link_cycles: float
    features: _Features


class _Predictor:
    """What the predictions of all assignments share."""

    def __init__(self, outline: Outline, levels: Sequence[Level], grouping: Grouping, members: np.ndarray) -> None:
        self.rates, self.members = outline.rates, members
        self.grouping = grouping
        problems = [outline.problems[kind] for _, kind in outline.visits]
        self.timetable = build_timetable(outline.around, outline.calls)
        self.boundary_bytes = compute_boundary_bytes(outline.around, outline.calls)
        self.costs = np.array(
            [[_make_cost(level[kind]) for level in levels] for _, kind in outline.visits], _VISIT_COST
        )
        self.costs["recompute_cycles"] *= outline.iterations[:, None, None]
        self.costs["output_cycles"] *= outline.iterations[:, None]
        self.iterations = outline.iterations
        self.is_stacked = np.array([problem.stacked for problem in problems])
        self.plain_saved_bytes = np.array([problem.plain_choice.saved_bytes for problem in problems], float)
        self.forward_cycles = outline.iterations * np.array([sum(problem.costs) for problem in problems], float)
        self.backward_cycles = outline.iterations * np.array([problem.backward_cycles for problem in problems], float)
        self.get_group = functools.cache(self._compute_group)

    def _compute_group(self, size: int, split: int, nested: bool) -> tuple[GroupMemory, np.ndarray]:
        groups = self.grouping.divide(size, split)
        memory = compute_group_memory(self.timetable, groups, self.boundary_bytes)
        outputs_mask = mark_recomputed_outputs(groups, len(self.members))
        if nested:
            stacks = self.grouping.count_stack_boundaries(size)
            memory = nest_groups(self.timetable, memory, self.boundary_bytes, stacks)
            outputs_mask[list(stacks)] = 1.0
        return memory, outputs_mask

    def predict(self, assignment: Assignment) -> _Row:
        """Predict one assignment."""
        levels = np.where(self.members < assignment.split, assignment.first, assignment.rest)
        costs = self.costs[np.arange(len(levels)), levels]
        visits = VisitMemory(
            saved_bytes=costs["saved_bytes"],
            forward_bytes=costs["forward_bytes"],
            backward_bytes=costs["backward_bytes"],
            plain_saved_bytes=self.plain_saved_bytes,
        )
        link_cycles, moved_bytes = 0.0, np.zeros(len(levels))
        if assignment.offload:
            moved_bytes = np.where(self.is_stacked, visits.saved_bytes, 0.0) * self.iterations
            visits = visits.offload(self.is_stacked)
            link_cycles = predict_link_cycles(
                moved_bytes, self.forward_cycles, self.backward_cycles, costs["recompute_cycles"], self.rates
            )
        group_memory, outputs_mask = (
            self.get_group(assignment.group, assignment.split, assignment.nested)
            if assignment.group > 1
            else (None, None)
        )
        peak = predict_peak(self.timetable, visits, group_memory)
        output_cycles = costs["output_cycles"]
        if assignment.nested:  # the group runs its blocks once more, and each of them again for its own backward pass
            output_cycles = output_cycles + costs["recompute_cycles"].sum(axis=1)
        recomputed = predict_recompute_cycles(costs["recompute_cycles"], output_cycles, outputs_mask)
        by_kind = costs["recompute_cycles"].sum(axis=0)
        matrix, reduction, elementwise, other = by_kind
        features = _Features(
            saved_bytes=visits.saved_bytes.sum(),
            unnamed_bytes=costs["bytes_without_region"].sum() + peak.held_bytes,
            backward_bytes=visits.backward_bytes.max(),
            matrix_cycles=matrix,
            reduction_cycles=reduction,
            elementwise_cycles=elementwise,
            other_cycles=other,
            visits_without_region=costs["is_without_region"].sum(),
            group_cycles=recomputed - by_kind.sum(),
            offloaded_bytes=sum(moved_bytes),
        )
        return _Row(peak.bytes, recomputed + link_cycles, link_cycles, features)


def _make_cost(choice: Choice) -> tuple[object, ...]:
    """Return a choice as a record of `_VISIT_COST`."""
    without_region = choice.names is None
    return (
        choice.saved_bytes,
        choice.forward_bytes,
        choice.backward_bytes,
        choice.cycles,
        choice.saved_bytes if without_region else 0,
        without_region,
        choice.output_cycles,
    )


def _compute_name_shares(
    outline: Outline, levels: Sequence[Level], assignments: Sequence[Assignment], members: np.ndarray
) -> np.ndarray | None:
    if not is_exhaustive(outline.problems):
        return None
    columns = [(kind, name) for kind, problem in enumerate(outline.problems) for name in (*problem.names, None)]
    counts = np.zeros((len(assignments), len(columns)))
    for row, assignment in zip(counts, assignments, strict=True):
        for member, (_, kind) in zip(members, outline.visits, strict=True):
            names = levels[assignment.get_level(member)][kind].names
            row += [k == kind and (name is None if names is None else name in names) for k, name in columns]
    return counts / len(outline.visits)
