# SPDX-License-Identifier: Apache-2.0
"""Which consecutive blocks can share one region (`Remat(group=k)`), and how a model is divided into such groups.

Sits on `outline`. What groups save and hold is in `memory`, what they recompute in `time`. Grouping pays where a model
is deep and what a block's backward pass needs is small compared with the block's input.
"""

import math
from collections.abc import Sequence

from ...rules.paths import Path
from ...transform.group import find_balanced_size
from .outline import Outline
from .schedule import Visit

_GROUP_SIZES = (2, 4)
# Regions inside regions cost one more forward pass: worth trying where a sequence is long.
_MIN_NESTED_LENGTH = 12


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
    def nested_sizes(self) -> tuple[int, ...]:
        """Blocks per group that are worth trying with a region for each block; empty where no sequence is long."""
        longest = max([*map(len, self._sequences), *(call.copies for call in self._get_stacks().values())], default=0)
        return (find_balanced_size(longest),) if longest >= _MIN_NESTED_LENGTH else ()

    @property
    def stacked_paths(self) -> frozenset[Path]:
        """Paths of the layers that a loop runs, which are groups of iterations."""
        return frozenset(self._outline.visits[visit][0] for visit in self._get_stacks())

    def count_stack_boundaries(self, size: int) -> dict[int, tuple[float, float]]:
        """Return for each visit of stacked layers what groups of `size` iterations change, in bytes.

        Args:
            size: Iterations per group.

        Returns:
            The inputs of iterations that are not saved any more, and those that a group holds during its backward pass.
        """
        found = {}
        for visit, call in self._get_stacks().items():
            carry = self._outline.around.count_bytes(self._outline.around.forward[call.forward].writes)
            found[visit] = float(carry * (call.copies - math.ceil(call.copies / size))), float(carry * size)
        return found

    def _get_stacks(self) -> dict[int, Visit]:
        return {
            number: call
            for number, call in enumerate(self._outline.calls)
            if call.copies >= _MIN_NESTED_LENGTH and call.copies == call.iterations
        }

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
