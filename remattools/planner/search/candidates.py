# SPDX-License-Identifier: Apache-2.0
"""All assignments of choices to blocks that a plan can be: predicted, and corrected by what was measured.

Sits on `outline` and `solve`. A level is one choice for each kind of block, made at one
price of a byte. An assignment gives one level to the first blocks and another to the
rest, so that its rules stay few; the first blocks can be grouped. Predictions only
order the search.
"""

import dataclasses
import functools
import itertools
from collections.abc import Sequence

import numpy as np

from ...rules.paths import Path
from ..model.block_ilp import BlockProblem, Choice
from ..model.groups import Grouping
from ..model.outline import Outline

# Cycles that a byte may cost; one pass over a value through main memory costs about 1e-3 to 1e-1.
_PRICES = tuple(float(price) for price in np.geomspace(30.0, 1e-4, 20))
# How far a prediction can be off before anything was measured, and how far what measurements do not explain.
_CONSTANT, _PRIOR, _LOCAL, _NOISE = 100.0, 0.5, 0.05, 1e-3
# All of these are parts of the largest figure that was measured, or of this part of what was predicted for it: where
# next to nothing was measured, as where all lies in a chip's own memory, the model is off by more than that.
_MIN_SCALE_SHARE = 0.3
# The same for each name that is kept, and for what like sets of names have in common.
_NAME, _NAMES = 0.1, 0.2
_MAX_SPLITS = 12
# Groups come on top of what single blocks keep: fewer of both are looked at.
_GROUPED_LEVELS, _GROUPED_SPLITS = 6, 6
# With so few values in a block every subset of them is a level.
_MAX_EXHAUSTIVE_NAMES = 4
# Parts of all that a block could keep.
_SAVED_SHARES = tuple(float(share) for share in np.geomspace(0.01, 0.9, 14))


@dataclasses.dataclass(frozen=True)
class Assignment:
    """Level `first` for the blocks before `split`, level `rest` for the others.

    Attributes:
        first: A level.
        rest: Likewise.
        split: How many blocks are the first.
        group: How many of the first blocks are one region.
        offload: Whether what the layers of loops keep waits in the host's memory.
    """

    first: int
    rest: int
    split: int
    group: int = 1
    offload: bool = False


class Space:
    """All assignments of one outline.

    Args:
        outline: The outline.
    """

    def __init__(self, outline: Outline) -> None:
        self.outline = outline
        self.members = list(dict.fromkeys(path for path, _ in outline.visits))
        place = {path: number for number, path in enumerate(self.members)}
        self._member_numbers = np.array([place[path] for path, _ in outline.visits])
        self.levels = _make_levels(outline)
        self._timetable = outline.build_timetable()
        self._grouping = Grouping(outline, self.members, self._timetable[2])
        self.assignments = [
            *self._make_assignments(),
            *self._make_grouped_assignments(),
            *self._make_offload_assignments(),
        ]
        # Cycles that transfers to the host and back take beyond what they overlap with, shape (assignments,): within
        # `cycles`, and by the model alone, since compilers do not count them.
        self.link_cycles = np.zeros(len(self.assignments))
        self.bytes, self.cycles, self.features = self._predict()
        self._name_shares = self._compute_name_shares()

    @property
    def groupable_paths(self) -> frozenset[Path]:
        """Sequences whose blocks can be grouped."""
        return self._grouping.groupable_paths

    @property
    def full_remat(self) -> Assignment:
        """Nothing kept anywhere."""
        return Assignment(0, 0, 0)

    @property
    def plain(self) -> Assignment:
        """No regions at all."""
        last = len(self.levels) - 1
        return Assignment(last, last, 0)

    def get_level(self, assignment: Assignment, member: int) -> int:
        """The level that a block has."""
        return assignment.first if member < assignment.split else assignment.rest

    def _make_assignments(self) -> list[Assignment]:
        count, depth = len(self.levels), len(self.members)
        uniform = [Assignment(level, level, 0) for level in range(count)]
        splits = sorted({round(x) for x in np.linspace(1, depth - 1, min(depth - 1, _MAX_SPLITS))}) if depth > 1 else []
        # The first blocks wait the longest for their backward pass, so they keep no more than the last.
        mixed = [Assignment(a, b, k) for a in range(count) for b in range(a + 1, count) for k in splits]
        return uniform + mixed

    def _make_grouped_assignments(self) -> list[Assignment]:
        count, depth = len(self.levels), len(self.members)
        few = sorted({round(x) for x in np.linspace(0, count - 2, min(count - 1, _GROUPED_LEVELS))})
        splits = sorted({round(x) for x in np.linspace(depth, 0, _GROUPED_SPLITS, endpoint=False)})
        found = []
        ends = {
            (size, split if split == depth else split // size * size)  # no group is smaller than the others
            for size, split in itertools.product(self._grouping.sizes, splits)
        }
        for (size, split), first in itertools.product(sorted(ends), few):
            if split == 0:
                continue
            # All that one group holds is alive at once, so a region over the plain model's blocks frees nothing.
            rests = [first] if split == depth else [level for level in (*few, count - 1) if level >= first]
            found += [Assignment(first, rest, split, size) for rest in rests]
        return found

    def _make_offload_assignments(self) -> list[Assignment]:
        """Layers of loops that keep their values in the host's memory.

        Where blocks are written out one behind the other, compilers keep them on the device as well.
        """
        stacked = [kind for kind, problem in enumerate(self.outline.problems) if problem.stacked]
        if not self.outline.rates.link_bytes:
            return []
        return [
            Assignment(number, number, 0, offload=True)
            for number, level in enumerate(self.levels)
            if any(level[kind].names for kind in stacked)
        ]

    def _offload_visits(self, values: np.ndarray) -> tuple[np.ndarray, float, float]:
        """Figures of visits whose kept values wait in the host's memory, the cycles that costs and the bytes moved.

        While one layer runs, the values of a neighbour are under way: they take room twice.
        """
        values, link_cycles, moved = values.copy(), 0.0, 0.0
        rates = self.outline.rates
        for row, call, (_, kind) in zip(values, self.outline.calls, self.outline.visits, strict=True):
            problem = self.outline.problems[kind]
            if not problem.stacked or not row[0]:
                continue
            size = row[0] * call.iterations
            back = call.iterations * sum(problem.graph.count_cycles(step, rates) for step in problem.graph.backward)
            for overlapped in (call.iterations * sum(problem.costs), back + row[3:7].sum()):
                link_cycles += max(0.0, size / rates.link_bytes - overlapped)
            row[1], row[2], row[0] = row[1] + row[0], row[2] + row[0], 0.0
            moved += size
        return values, link_cycles, moved

    def _predict(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        base, kept, runs = self._timetable
        table = [[level[kind] for level in self.levels] for _, kind in self.outline.visits]
        figures = np.array([[_make_value_row(choice) for choice in row] for row in table])  # (visits, levels, figures)
        figures[:, :, [3, 4, 5, 6, 9]] *= self.outline.iterations[:, None, None]
        numbers = self._member_numbers
        kinds = [kind for _, kind in self.outline.visits]
        plain = np.array([self.outline.problems[kind].plain_choice.saved_bytes for kind in kinds], float)
        grouped = functools.cache(self._grouping.compute_effect)
        total_bytes, cycles, features = [], [], []
        for number, assignment in enumerate(self.assignments):
            picked = np.where(numbers < assignment.split, assignment.first, assignment.rest)
            mine, moved = figures[np.arange(len(numbers)), picked], 0.0
            if assignment.offload:
                mine, self.link_cycles[number], moved = self._offload_visits(mine)
            moments = base + kept @ mine[:, 0] + (runs == 1) @ mine[:, 1] + (runs == 2) @ mine[:, 2]
            recomputed, held = float(mine[:, 3:7].sum()), 0.0
            if assignment.group > 1:
                change = grouped(assignment.group, assignment.split)
                waiting = np.maximum(plain - mine[:, 0], 0.0)
                moments = moments - change.dropped_bytes + change.held_mask @ waiting
                recomputed += float(change.recomputed_mask @ mine[:, 9])
                held = float((change.held_mask @ waiting).max())
            total_bytes.append(float(moments.max()))
            cycles.append(recomputed + self.link_cycles[number])
            # What the predictions may be wrong in: kept bytes, those kept without names (by blocks without a region, or
            # while a group has its turn), kinds of recomputation.
            work = mine[:, 3:7].sum(axis=0)
            features.append(
                [mine[:, 0].sum(), mine[:, 7].sum() + held, mine[:, 2].max(), *work, mine[:, 8].sum()]
                + [recomputed - work.sum(), moved]
            )
        # What is learnt of the others must not depend on whether offloading is looked at.
        scale = np.abs(np.array(features))[[not assignment.offload for assignment in self.assignments]].max(axis=0)
        scale[-1] = max(feature[-1] for feature in features)
        return np.array(total_bytes), np.array(cycles), np.array(features) / np.where(scale > 0, scale, 1.0)

    def correct_predictions(self, kind: str, measurements: dict[int, float]) -> tuple[np.ndarray, np.ndarray]:
        """Predictions of all assignments and how far they may be off, given the measured figures of some.

        Args:
            kind: "bytes" or "cycles".
            measurements: Figures by the assignments' numbers; at least one.

        Returns:
            Means and standard deviations, both shape (assignments,), in the figure's unit.
        """
        raw = self.bytes if kind == "bytes" else self.cycles
        seen = np.array(list(measurements))
        values = np.array([measurements[number] for number in seen])
        scale = max(np.abs(values).max(), _MIN_SCALE_SHARE * np.abs(raw[seen]).max(), 1.0)
        # A Gaussian process on what the model got wrong: a constant, a wrong rate for each feature, and the rest.
        cross = self._compute_kernel(np.arange(len(raw)), seen)
        among = self._compute_kernel(seen, seen) + _NOISE**2 * np.eye(len(seen))
        wrong = (values - raw[seen]) / scale
        explained = np.linalg.solve(among, np.column_stack([wrong, cross.T]))
        found = raw + scale * (cross @ explained[:, 0])
        own = _CONSTANT + _PRIOR**2 * (self.features**2).sum(axis=1) + _LOCAL**2
        if self._name_shares is not None:
            own += _NAME**2 * (self._name_shares**2).sum(axis=1) + _NAMES**2
        spread = scale * np.sqrt(np.maximum(own - (cross * explained[:, 1:].T).sum(axis=1), 0.0))
        found[seen], spread[seen] = values, 0.0
        return np.asarray(found), np.asarray(spread)

    def _compute_kernel(self, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        a, b = self.features[left], self.features[right]
        found = _CONSTANT + _PRIOR**2 * (a @ b.T) + _LOCAL**2 * np.exp(-_compute_squared_distances(a, b) / 0.05)
        if self._name_shares is not None:
            a, b = self._name_shares[left], self._name_shares[right]
            found += _NAME**2 * (a @ b.T) + _NAMES**2 * np.exp(-_compute_squared_distances(a, b))
        return np.asarray(found)

    def _compute_name_shares(self) -> np.ndarray | None:
        """In what part of the visits each name is kept, shape (assignments, names); None where names are many.

        The compiler may need more memory for a block that keeps more or the other way round. Where all subsets of a few
        names are looked at, it is learnt by name, from the measurements.
        """
        problems = self.outline.problems
        if not _is_exhaustive(problems):
            return None
        columns = [(kind, name) for kind, problem in enumerate(problems) for name in (*problem.names, None)]
        found = np.zeros((len(self.assignments), len(columns)))
        for row, assignment in zip(found, self.assignments, strict=True):
            for member, (_, kind) in zip(self._member_numbers, self.outline.visits, strict=True):
                names = self.levels[self.get_level(assignment, member)][kind].names
                row += [k == kind and (name is None if names is None else name in names) for k, name in columns]
        return found / len(self.outline.visits)


def _compute_squared_distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.asarray(((a[:, None] - b[None]) ** 2).sum(axis=-1))


def _is_exhaustive(problems: Sequence[BlockProblem]) -> bool:
    return max(len(problem.names) for problem in problems) <= _MAX_EXHAUSTIVE_NAMES


def _make_levels(outline: Outline) -> list[tuple[Choice, ...]]:
    levels: list[tuple[Choice, ...]] = [tuple(problem.make_choice(()) for problem in outline.problems)]
    for price in _PRICES:
        # A byte that all blocks keep costs as much per block as it costs once in memory.
        levels.append(tuple(problem.find_cheapest(price) for problem in outline.problems))
    # A price finds only what no mixture of two others beats; between those a limit finds more.
    for share in _SAVED_SHARES:
        limits = [share * max(sum(problem.bytes.values()), 1) for problem in outline.problems]
        levels.append(
            tuple(problem.find_cheapest(0.0, limit) for problem, limit in zip(outline.problems, limits, strict=True))
        )
    few = _is_exhaustive(outline.problems)
    if few:  # all there is, alike for each kind of block
        for positions in itertools.product((False, True), repeat=_MAX_EXHAUSTIVE_NAMES):
            levels.append(tuple(problem.make_choice(_select_names(problem, positions)) for problem in outline.problems))
    levels = sorted({_make_level_key(level): level for level in reversed(levels)}.values(), key=_count_saved_bytes)
    plain = tuple(problem.plain_choice for problem in outline.problems)
    if few:  # what the plain model keeps is a guess, and there is little enough to let the compiler judge
        return [*levels, plain]
    # A region that keeps more than no region at all would only cost time.
    return [*(level for level in levels if _count_saved_bytes(level) < _count_saved_bytes(plain)), plain]


def _select_names(problem: BlockProblem, mask: Sequence[bool]) -> list[str]:
    return [name for name, taken in zip(problem.names, mask, strict=False) if taken]


def _count_saved_bytes(level: Sequence[Choice]) -> int:
    return sum(choice.saved_bytes for choice in level)


def _make_level_key(level: Sequence[Choice]) -> tuple[frozenset[str], ...]:
    return tuple(frozenset(choice.names or ()) for choice in level)


def _make_value_row(choice: Choice) -> list[float]:
    plain = choice.names is None
    return [
        float(choice.saved_bytes),
        float(choice.forward_bytes),
        float(choice.backward_bytes),
        *choice.cycles,
        float(choice.saved_bytes) if plain else 0.0,
        float(plain),
        choice.output_cycles,
    ]
