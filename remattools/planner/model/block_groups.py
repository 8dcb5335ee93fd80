# SPDX-License-Identifier: Apache-2.0
"""Which consecutive blocks can share one region (`Remat(group=k)`), and how a model is divided into such groups.

Sits on `outline`. What groups save and hold is in `memory`, what they recompute in `time`. Grouping pays where a model
is deep and what a block's backward pass needs is small compared with the block's input.
"""

import math
from collections.abc import Sequence

from ...rules.paths import Path
from .outline import Outline

_GROUP_SIZES = (2, 4)


class Grouping:
    """The groups that one outline allows.

    Args:
        outline: The outline.
        members: Paths of the blocks in the order of their first visits.
    """

    def __init__(self, outline: Outline, members: Sequence[Path]) -> None:
        self._outline, self._positions = outline, {path: number for number, path in enumerate(members)}
        self._sequences = _find_sequences(outline)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Blocks per group that are worth trying, ascending; empty where nothing can be grouped."""
        longest = max(map(len, self._sequences), default=0)
        return tuple(sorted({size for size in (*_GROUP_SIZES, round(math.sqrt(longest))) if 2 <= size <= longest // 2}))

    @property
    def groupable_paths(self) -> frozenset[Path]:
        """Paths of the sequences whose blocks can be grouped."""
        return frozenset(self._outline.visits[row[0]][0][:-1] for row in self._sequences)

    def divide(self, size: int, split: int) -> list[list[int]]:
        """Return the visits of each group of two or more, where the first `split` blocks form groups of `size`."""
        groups = []
        for row in self._sequences:
            grouped = [visit for visit in row if self._positions[self._outline.visits[visit][0]] < split]
            groups += [grouped[first : first + size] for first in range(0, len(grouped), size)]
        return [group for group in groups if len(group) > 1]


def _find_sequences(outline: Outline) -> list[list[int]]:
    """Return the visits of each sequence whose blocks run once each, one directly after the other."""
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
