# SPDX-License-Identifier: Apache-2.0
"""The assignments of choices to blocks that a plan can be.

Sits on `block_ilp` and `block_groups`. A level is one choice for each kind of block. An assignment has one level for
the first blocks and another for the rest, so that its rules stay few; the first blocks can be grouped.
"""

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np

from ..model.block_groups import Grouping
from ..model.block_ilp import BlockProblem, Choice
from ..model.outline import Outline

# Cycles that a saved byte may cost; one pass over a value through main memory costs about 1e-3 to 1e-1.
_PRICES = tuple(float(price) for price in np.geomspace(30.0, 1e-4, 20))
_MAX_SPLITS = 12
# Groups multiply the assignments of single blocks: fewer levels and splits are combined with them.
_GROUPED_LEVELS, _GROUPED_SPLITS = 6, 6
# In a block with so few names every subset of them is a level.
_MAX_EXHAUSTIVE_NAMES = 4
# Parts of all that a block could save.
_SAVED_SHARES = tuple(float(share) for share in np.geomspace(0.01, 0.9, 14))

Level = tuple[Choice, ...]


@dataclasses.dataclass(frozen=True)
class Assignment:
    """Level `first` for the blocks before `split`, level `rest` for the others.

    Attributes:
        first: Number of a level.
        rest: Number of a level.
        split: How many blocks have the level `first`.
        group: How many of these blocks share one region.
        offload: Whether what the layers of loops save is stored in the host's memory.
        nested: Whether each block of a group is a region inside the group's; layers of loops are grouped then too.
    """

    first: int
    rest: int
    split: int
    group: int = 1
    offload: bool = False
    nested: bool = False

    def get_level(self, member: int) -> int:
        """Return the number of the level of a block, by the block's position."""
        return self.first if member < self.split else self.rest


def is_exhaustive(problems: Sequence[BlockProblem]) -> bool:
    """Return whether the blocks are small enough that every subset of their names is a level."""
    return max(len(problem.names) for problem in problems) <= _MAX_EXHAUSTIVE_NAMES


def make_levels(outline: Outline) -> list[Level]:
    """Return the levels of an outline: from saving nothing, by rising saved bytes, to no region at all."""
    levels: list[Level] = [tuple(problem.make_choice(()) for problem in outline.problems), make_least_level(outline)]
    for price in _PRICES:
        # A byte that all blocks save costs as much per block as it costs once in memory.
        levels.append(tuple(problem.find_cheapest(price) for problem in outline.problems))
    # Prices find only choices that no mixture of two others beats; limits also find those between.
    for share in _SAVED_SHARES:
        limits = [share * max(sum(problem.bytes.values()), 1) for problem in outline.problems]
        levels.append(
            tuple(problem.find_cheapest(0.0, limit) for problem, limit in zip(outline.problems, limits, strict=True))
        )
        if any(problem.saved_masks for problem in outline.problems):
            # Whether drawing masks again takes more memory depends on the compiler's fusions: a compile may find out.
            levels.append(
                tuple(
                    problem.find_cheapest(0.0, limit, draws_masks=True)
                    for problem, limit in zip(outline.problems, limits, strict=True)
                )
            )
    exhaustive = is_exhaustive(outline.problems)
    if exhaustive:  # every subset, the same positions for each kind of block
        for mask in itertools.product((False, True), repeat=_MAX_EXHAUSTIVE_NAMES):
            levels.append(tuple(problem.make_choice(_select_names(problem, mask)) for problem in outline.problems))
    levels = sorted({_make_level_key(level): level for level in reversed(levels)}.values(), key=_count_saved_bytes)
    plain = tuple(problem.plain_choice for problem in outline.problems)
    if exhaustive:  # what the plain model saves is an estimate, and the levels are few: let the compiler judge
        return [*levels, plain]
    # A region that saves more than the plain block would only cost time.
    return [*(level for level in levels if _count_saved_bytes(level) < _count_saved_bytes(plain)), plain]


def make_least_level(outline: Outline) -> Level:
    """Return the level that saves least: nothing, or the dropout masks alone where drawing them again takes more."""
    return tuple(problem.make_choice(problem.saved_masks) for problem in outline.problems)


def make_assignments(outline: Outline, levels: Sequence[Level], grouping: Grouping, depth: int) -> list[Assignment]:
    """Return all assignments that are worth predicting.

    Args:
        outline: The outline.
        levels: Its levels, from `make_levels`.
        grouping: The groups that it allows.
        depth: How many blocks there are.
    """
    return [
        *_make_split_assignments(len(levels), depth),
        *_make_grouped_assignments(levels, depth, grouping, get_number(levels, make_least_level(outline))),
        *_make_nested_assignments(outline, levels, depth, grouping),
        *_make_offload_assignments(outline, levels),
    ]


def _make_split_assignments(count: int, depth: int) -> list[Assignment]:
    uniform = [Assignment(level, level, 0) for level in range(count)]
    splits = sorted({round(x) for x in np.linspace(1, depth - 1, min(depth - 1, _MAX_SPLITS))}) if depth > 1 else []
    # The first blocks wait longest for their backward pass, so that they save no more than the last ones.
    mixed = [Assignment(a, b, k) for a in range(count) for b in range(a + 1, count) for k in splits]
    return uniform + mixed


def get_number(levels: Sequence[Level], level: Level) -> int:
    """Return the number of the level that saves the same names."""
    return list(map(_make_level_key, levels)).index(_make_level_key(level))


def _make_grouped_assignments(levels: Sequence[Level], depth: int, grouping: Grouping, least: int) -> list[Assignment]:
    count = len(levels)
    few = sorted({least, *(round(x) for x in np.linspace(least, count - 2, min(count - 1, _GROUPED_LEVELS)))})
    splits = sorted({round(x) for x in np.linspace(depth, 0, _GROUPED_SPLITS, endpoint=False)})
    assignments = []
    ends = {
        (size, split if split == depth else split // size * size)  # no group is smaller than the others
        for size, split in itertools.product(grouping.sizes, splits)
    }
    for (size, split), first in itertools.product(sorted(ends), few):
        if split == 0:
            continue
        # All that one group holds is live at once, so a region over plain blocks frees nothing.
        rests = [first] if split == depth else [level for level in (*few, count - 1) if level >= first]
        assignments += [Assignment(first, rest, split, size) for rest in rests]
    return assignments


def _make_nested_assignments(
    outline: Outline, levels: Sequence[Level], depth: int, grouping: Grouping
) -> list[Assignment]:
    """Return assignments of regions inside regions.

    They free inputs of blocks, so blocks that save more than their inputs are not worth the second recomputation.
    """
    sizes = [outline.around.count_bytes(outline.around.forward[call.forward].writes) for call in outline.calls]
    limits = {kind: size for (_, kind), size in zip(outline.visits, sizes, strict=True)}
    cheap = [n for n, level in enumerate(levels[:-1]) if all(level[k].saved_bytes <= limits[k] for k in limits)]
    few = sorted({cheap[round(x)] for x in np.linspace(0, len(cheap) - 1, min(len(cheap), _GROUPED_LEVELS))})
    return [Assignment(n, n, depth, size, nested=True) for size in grouping.nested_sizes for n in few]


def _make_offload_assignments(outline: Outline, levels: Sequence[Level]) -> list[Assignment]:
    """Return assignments whose layers of loops offload what they save.

    Blocks outside loops are not offloaded: compilers keep a copy of their values on the device.
    """
    stacked = [kind for kind, problem in enumerate(outline.problems) if problem.stacked]
    if not outline.rates.link_bytes:
        return []
    return [
        Assignment(number, number, 0, offload=True)
        for number, level in enumerate(levels)
        if any(level[kind].names for kind in stacked)
    ]


def _select_names(problem: BlockProblem, mask: Sequence[bool]) -> list[str]:
    return [name for name, selected in zip(problem.names, mask, strict=False) if selected]


def _count_saved_bytes(level: Level) -> int:
    return sum(choice.saved_bytes for choice in level)


def _make_level_key(level: Level) -> tuple[frozenset[str], ...]:
    return tuple(frozenset(choice.names or ()) for choice in level)
