# SPDX-License-Identifier: Apache-2.0
"""Which assignment to compile next, and what the compiled ones say of the others.

Sits on `search` and `writing`. The planner's model proposes, the compiler disposes:
each measurement corrects the predictions of all that is not compiled yet.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import scipy

from ...compiler.measurement import Measurement, format_bytes, format_count
from ...errors import RuleError
from ...rules.ruleset import Rules
from ..budget import Of, bytes_of
from ..result import Point, Prediction
from .candidates import Space
from .to_rules import rules_of

# Below this gain a further compile is not worth its time. Doubts are doubtful themselves, so it is small.
_GAIN = 1e-4
# Where nothing keeps a budget yet: the chance from which an assignment is taken to keep it.
_LIKELY = 0.5
# Budgets at which a frontier is asked whether it could be better, and what a budget that nothing keeps yet is taken
# for, in times of the slowest point.
_BUDGETS, _UNREACHED = 24, 1.2
# How far below expectation the budgets begin, in standard deviations, and below the least that was measured. Without
# the first the curve of benchmarks/remat_groups.py ends at 41.5 MB instead of 32.8.
_DOUBTS, _BELOW = 1.5, 0.8


@dataclasses.dataclass(frozen=True)
class Expected:
    """What is expected of each assignment, shape (assignments,) each.

    Attributes:
        bytes: Of the budget's kind.
        bytes_doubt: One standard deviation of that.
        cycles: Of a whole step.
        cycles_doubt: One standard deviation of that; 0 where cycles are the planner's own model.
    """

    bytes: np.ndarray
    bytes_doubt: np.ndarray
    cycles: np.ndarray
    cycles_doubt: np.ndarray


class Exploration:
    """Compiled points, and what they say of the others.

    Args:
        space: What can be compiled.
        measured_by: Compiles a set of rules.
        of: The figure that budgets are about.
        plain_cycles: The planner's own count for the plain model.
        progress: Told of each compile before it begins.
    """

    def __init__(
        self,
        *,
        space: Space,
        measured_by: Callable[[Rules], Measurement],
        of: Of,
        plain_cycles: float,
        progress: Callable[[str], None],
    ) -> None:
        self.space, self.measured_by, self.of = space, measured_by, of
        self.plain_cycles, self.progress = plain_cycles, progress
        self.points: dict[int, Point] = {}
        self.refused: set[int] = set()
        self.by_rules: dict[Rules, Measurement] = {}

    def compile(self, number: int) -> None:
        """Measure an assignment."""
        rules = rules_of(self.space, self.space.assignments[number])
        predicted = self._predicted(number)
        self.progress(
            f"compile {len(self.points) + 1}: expecting {format_bytes(predicted.bytes)}, "
            f"{format_count(predicted.cycles)} cycles"
        )
        if rules not in self.by_rules:
            try:
                self.by_rules[rules] = self.measured_by(rules)
            except RuleError:
                if self.space.assignments[number].group == 1:
                    raise
                # What lies between the blocks cannot be cut into groups: no group of this model can.
                self.refused |= {n for n, other in enumerate(self.space.assignments) if other.group > 1}
                return
        self._add(number, rules, predicted)

    def recall(self, remembered: Iterable[tuple[Rules, Measurement]]) -> None:
        """Take up what was compiled before, as far as it is one of this space's assignments."""
        known = dict(remembered)
        if not known:
            return
        numbers = {rules_of(self.space, a): number for number, a in reversed(list(enumerate(self.space.assignments)))}
        for rules, measured in known.items():
            if rules in numbers and numbers[rules] not in self.points:
                predicted = self._predicted(numbers[rules])
                self.by_rules[rules] = measured
                self._add(numbers[rules], rules, predicted)

    def _predicted(self, number: int) -> Prediction:
        expected = self.expected()
        # The first error may be larger than what the model predicted, and nothing takes less than nothing.
        return Prediction(bytes=max(int(expected.bytes[number]), 0), cycles=float(expected.cycles[number]))

    def _add(self, number: int, rules: Rules, predicted: Prediction) -> None:
        measured = self.by_rules[rules]
        time_taken = self.plain_cycles + self.space.cycles[number]
        if measured.estimated_cycles is not None:
            time_taken = float(measured.estimated_cycles) + self.space.link_cycles[number]
        elif not measured.fits:
            time_taken = float("inf")
        self.points[number] = Point(
            rules=rules,
            predicted=predicted,
            measured=measured,
            bytes=bytes_of(measured, self.of),
            cycles=float(time_taken),
            link_cycles=float(self.space.link_cycles[number]),
        )

    def expected(self) -> Expected:
        """What the model and all that was measured say of each assignment."""
        fitting = {number: point for number, point in self.points.items() if point.measured.fits}
        cycles, certain = self.plain_cycles + self.space.cycles, np.zeros(len(self.space.assignments))
        if not fitting:
            return Expected(self.space.bytes, certain, cycles, certain)
        by_bytes = self.space.corrected("bytes", {n: float(p.bytes) for n, p in fitting.items()})
        if any(point.measured.estimated_cycles is None for point in fitting.values()):
            return Expected(*by_bytes, cycles, certain)
        return Expected(*by_bytes, *self.space.corrected("cycles", {n: p.cycles for n, p in fitting.items()}))

    def _is_open(self, number: int) -> bool:
        return number not in self.points and number not in self.refused

    def propose(self, limit: int | None, max_cycles: float | None) -> int | None:
        """The assignment to compile next for these limits, or None if none promises more."""
        expected = self.expected()
        open_ = np.array([self._is_open(number) for number in range(len(expected.bytes))])
        size, time = (expected.bytes, expected.bytes_doubt), (expected.cycles, expected.cycles_doubt)
        goal = time if max_cycles is None else size
        best = best_point(self.points.values(), limit, max_cycles)
        chance = open_.astype(float)
        for figure, most in ((size, limit), (time, max_cycles)):
            if most is not None:
                chance *= _chance(*figure, most)
        if best is not None:
            reached = best.cycles if max_cycles is None else best.bytes
            return _most_promising(chance * _improvement(*goal, max(float(reached), 1.0)))
        if not open_.any():
            return None
        likely = np.flatnonzero(chance > _LIKELY)
        if len(likely):  # of those that most probably do, the best
            return int(likely[goal[0][likely].argmin()])
        fitting = [point for point in self.points.values() if point.measured.fits]
        if not fitting:  # what takes least
            return int(np.where(open_, expected.bytes, np.inf).argmin())
        # Nothing is expected to do: what comes nearer to the limit that is missed than all that was tried.
        late = max_cycles is not None and all(point.cycles > max_cycles for point in fitting)
        nearest = min(point.cycles if late else point.bytes for point in fitting)
        return _most_promising(open_ * _improvement(*(time if late else size), max(float(nearest), 1.0)))

    def propose_anywhere(self) -> int | None:
        """The assignment that promises most at whatever budget, or None if none promises more."""
        expected = self.expected()
        open_ = np.array([number for number in range(len(expected.bytes)) if self._is_open(number)])
        fitting = [point for point in self.points.values() if point.measured.fits]
        if not len(open_):
            return None
        sizes, cycles = expected.bytes[open_], expected.cycles[open_]
        if not fitting:  # not even the plain model fits: what takes least
            return int(open_[sizes.argmin()])
        nothing = self.space.assignments.index(self.space.nothing)
        if len(self.points) == 1 and nothing in open_:  # both ends are known before anything between them is judged
            return nothing
        most = max([1, *(point.bytes for point in fitting)])
        slowest = max(point.cycles for point in fitting)
        # Budgets that nothing is expected to keep count as well, as far as that is doubtful.
        lowest = float((sizes - _DOUBTS * expected.bytes_doubt[open_]).min())
        lowest = max(lowest, _BELOW * min(point.bytes for point in fitting), 1.0)
        limits = np.geomspace(min(lowest, most), most, _BUDGETS)
        found = [best_point(fitting, limit, None) for limit in limits]
        best = np.array([_UNREACHED * slowest if point is None else point.cycles for point in found])
        chance = _chance(sizes[:, None], expected.bytes_doubt[open_][:, None], limits)
        # The part of the plane under the curve that each is expected to add, times the chance that it keeps the budget:
        # a gain at many budgets is worth more than at one.
        promised = chance * _improvement(cycles[:, None], expected.cycles_doubt[open_][:, None], best)
        found_at = _most_promising(promised.mean(axis=1))
        return None if found_at is None else int(open_[found_at])


def _most_promising(promised: np.ndarray) -> int | None:
    """The assignment from which most is expected, None if that is not worth a compile."""
    return int(promised.argmax()) if promised.max() > _GAIN else None


def _chance(figure: np.ndarray, doubt: np.ndarray, most: float | np.ndarray) -> np.ndarray:
    """How likely each stays within a limit."""
    return np.asarray(scipy.special.ndtr((most - figure) / np.maximum(doubt, 1e-6 * np.maximum(most, 1.0))))


def _improvement(goal: np.ndarray, doubt: np.ndarray, reached: float | np.ndarray) -> np.ndarray:
    """How much less than what is reached is expected of each, as a part of it: the mean over a normal distribution.

    Known as the expected improvement (Mockus 1975); without doubt it is the difference, or 0.
    """
    spread = np.maximum(doubt, 1e-9 * reached)
    z = (reached - goal) / spread
    density = np.exp(-0.5 * z**2) / np.sqrt(2 * np.pi)
    return np.asarray(((reached - goal) * scipy.special.ndtr(z) + spread * density) / reached)


def best_point(points: Iterable[Point], limit: float | None, max_cycles: float | None) -> Point | None:
    """The best compiled point that keeps the limits: the fastest, or the smallest if a time is the limit."""
    kept: Sequence[Point] = [
        point
        for point in points
        if point.measured.fits
        and (limit is None or point.bytes <= limit)
        and (max_cycles is None or point.cycles <= max_cycles)
    ]
    return min(kept, key=lambda point: _order(point.bytes, point.cycles, max_cycles), default=None)


def _order(size: float, cycles: float, max_cycles: float | None) -> tuple[float, float]:
    return (cycles, size) if max_cycles is None else (size, cycles)
