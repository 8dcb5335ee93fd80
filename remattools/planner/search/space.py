# SPDX-License-Identifier: Apache-2.0
"""The search space of one outline: all assignments, what is predicted for them, and what measurements say of them.

Sits on `assignments`, `predictions` and `surrogate`.
"""

import functools
from collections.abc import Mapping
from typing import Literal

import numpy as np

from ...rules.paths import Path
from ..model.block_groups import Grouping
from ..model.outline import Outline
from .assignments import Assignment, Level, get_number, make_assignments, make_least_level, make_levels
from .predictions import predict_assignments
from .short_names import BlockNames
from .surrogate import Surrogate

# Regions inside regions cost a forward pass: a frontier ends with them only if they take less than this share.
_MAX_NESTED_SHARE = 0.8


class Space:
    """All assignments of one outline.

    Args:
        outline: The outline.

    Attributes:
        outline: The outline.
        members: Paths of the blocks in the order of their first visits.
        levels: One choice for each kind of block, by rising saved bytes; the last has no regions.
        assignments: All assignments; their numbers index the arrays below.
        bytes: Predicted peak without the program's arguments and results, shape (assignments,).
        cycles: Predicted cycles beyond those of the plain model, shape (assignments,).
        link_cycles: The part of `cycles` that transfers to the host take, shape (assignments,).
        features: What the predictions may be wrong in, shape (assignments, features).
    """

    def __init__(self, outline: Outline) -> None:
        self.outline: Outline = outline
        self.members: list[Path] = list(dict.fromkeys(path for path, _ in outline.visits))
        positions = {path: number for number, path in enumerate(self.members)}
        self._grouping = Grouping(outline, self.members)
        self.levels: list[Level] = make_levels(outline)
        self.assignments: list[Assignment] = make_assignments(outline, self.levels, self._grouping, len(self.members))
        predicted = predict_assignments(
            outline,
            self.levels,
            self.assignments,
            grouping=self._grouping,
            members=np.array([positions[path] for path, _ in outline.visits]),
        )
        self.bytes: np.ndarray = predicted.bytes
        self.cycles: np.ndarray = predicted.cycles
        self.link_cycles: np.ndarray = predicted.link_cycles
        self.features: np.ndarray = predicted.features
        self._surrogate = Surrogate(predicted.features, predicted.name_shares)

    @functools.cached_property
    def block_names(self) -> tuple[BlockNames, ...]:
        """The names of each kind of block."""
        outline = self.outline
        return tuple(map(BlockNames, outline.problems, (kind.block.jaxpr for kind in outline.kinds)))

    @property
    def groupable_paths(self) -> frozenset[Path]:
        """Paths of the sequences whose blocks can be grouped."""
        return self._grouping.groupable_paths

    @property
    def stacked_paths(self) -> frozenset[Path]:
        """Paths of the layers of loops, whose iterations can be grouped."""
        return self._grouping.stacked_paths

    @property
    def full_remat(self) -> Assignment:
        """The assignment that saves nothing anywhere, or only dropout masks where they cost less than to draw them."""
        least = get_number(self.levels, make_least_level(self.outline))
        return Assignment(least, least, 0)

    @property
    def smallest(self) -> tuple[Assignment, ...]:
        """The assignments that save nothing, and that nothing between them and the plain model is smaller than.

        Regions inside regions are among them where a loop runs many layers, and their inputs are what it saves most.
        """
        nested = [a for a in self.assignments if a.nested and a.first == a.rest == 0] if self.stacked_paths else []
        predicted = {a: self.bytes[self.assignments.index(a)] for a in (self.full_remat, *nested)}
        limit = _MAX_NESTED_SHARE * predicted[self.full_remat]
        return (self.full_remat, *(a for a in nested if predicted[a] < limit))

    @property
    def plain(self) -> Assignment:
        """The assignment without regions."""
        last = len(self.levels) - 1
        return Assignment(last, last, 0)

    def correct_predictions(
        self, quantity: Literal["bytes", "cycles"], measurements: Mapping[int, float]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return what is expected of all assignments, given the measurements of some.

        Args:
            quantity: What was measured.
            measurements: Measured bytes or cycles by the numbers of the assignments; at least one.

        Returns:
            Means and standard deviations in bytes or cycles, both of shape (assignments,).
        """
        return self._surrogate.correct(self.bytes if quantity == "bytes" else self.cycles, measurements)
