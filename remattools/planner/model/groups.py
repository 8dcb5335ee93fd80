# SPDX-License-Identifier: Apache-2.0
"""Groups of consecutive blocks in one region: which there can be, and what they change over time.

Sits on `outline`. Between the passes a group keeps the input of its first block instead of
one for each block. In exchange it recomputes all of its blocks before the first
backward pass of them, and holds what those need until each had its turn. That pays where
a model is deep and what a block needs is little beside its input.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from ...rules.paths import Path
from .outline import Outline

_GROUP_SIZES = (2, 4)


@dataclasses.dataclass(frozen=True)
class GroupEffect:
    """What grouping the first blocks changes.

    Attributes:
        dropped_bytes: Bytes of blocks' inputs that are not there, by moment.
        held_mask: A matrix (moments, visits): 1 where a group holds what that visit's backward pass needs.
        recomputed_mask: For each visit 1 if it has to be recomputed up to its outputs, because another block of its group
            reads them.
    """

    dropped_bytes: np.ndarray
    held_mask: np.ndarray
    recomputed_mask: np.ndarray


class Grouping:
    """The groups of one outline.

    Args:
        outline: The outline.
        members: Paths of the blocks in the order of their first visits.
        runs: A matrix (moments, visits), from `Outline.timetable`: 1 where a visit runs forward, 2 backward.
    """

    def __init__(self, outline: Outline, members: Sequence[Path], runs: np.ndarray) -> None:
        self._outline, self._positions = outline, {path: number for number, path in enumerate(members)}
        self._forward_moments = (runs == 1).argmax(axis=0)
        self._backward_moments = np.where((runs == 2).any(axis=0), (runs == 2).argmax(axis=0), len(runs))
        self._sequences = _find_sequences(outline)
        self._num_moments = len(runs)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Blocks per group that are worth a look, least first; empty where nothing can be grouped."""
        longest = max(map(len, self._sequences), default=0)
        return tuple(sorted({size for size in (*_GROUP_SIZES, round(math.sqrt(longest))) if 2 <= size <= longest // 2}))

    @property
    def groupable_paths(self) -> frozenset[Path]:
        """Paths of the sequences that can be grouped."""
        return frozenset(self._outline.visits[row[0]][0][:-1] for row in self._sequences)

    def compute_effect(self, size: int, split: int) -> GroupEffect:
        """What groups of `size` among the first `split` blocks change."""
        visits = len(self._outline.visits)
        found = GroupEffect(np.zeros(self._num_moments), np.zeros((self._num_moments, visits)), np.zeros(visits))
        time = np.arange(self._num_moments)
        for row in self._sequences:
            taken = [visit for visit in row if self._positions[self._outline.visits[visit][0]] < split]
            for first in range(0, len(taken), size):
                group = taken[first : first + size]
                if len(group) == 1:
                    continue
                begins = self._backward_moments[group[-1]]  # the backward passes run from the last block to the first
                for visit in group:
                    found.held_mask[(time >= begins) & (time < self._backward_moments[visit]), visit] = 1.0
                found.recomputed_mask[group[:-1]] = 1.0
                for visit in group[1:]:
                    gone = (time > self._forward_moments[visit]) & (time < begins)
                    found.dropped_bytes[gone] += self._outline.boundary_bytes[visit]
        return found


def _find_sequences(outline: Outline) -> list[list[int]]:
    """Visits of each sequence whose blocks run once, one behind the other."""
    by_holder: dict[Path, list[int]] = {}
    for number, (path, _) in enumerate(outline.visits):
        by_holder.setdefault(path[:-1], []).append(number)
    rows = []
    for numbers in by_holder.values():
        indices = [outline.visits[number][0][-1] for number in numbers]
        together = numbers == list(range(numbers[0], numbers[0] + len(numbers)))
        together = together and all(outline.calls[number].copies == 1 for number in numbers)
        if together and all(isinstance(i, int) for i in indices) and indices == list(range(len(indices))):
            rows.append(numbers)
    return rows
