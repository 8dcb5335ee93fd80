# SPDX-License-Identifier: Apache-2.0
"""Which assignment to compile next, and what the compiled ones say of the others.

Sits on `search` and `writing`. The planner's model proposes, the compiler disposes:
each measurement corrects the predictions of all that is not compiled yet.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import scipy

from ...compiler.report import Measurement, format_bytes, format_count
from ...errors import RuleError
from ...rules.ruleset import Rules
from ..budget import BudgetKind, select_bytes
from ..result import Point, Prediction
from .candidates import Space
from .to_rules import write_rules

# Below this gain a further compile is not worth its time. Doubts are doubtful themselves, so it is small.
_MIN_GAIN = 1e-4
# Where nothing keeps a budget yet: the chance from which an assignment is taken to keep it.
_MIN_PROBABILITY = 0.5
# Budgets at which a frontier is asked whether it could be better, and what a budget that nothing keeps yet is taken
# for, in times of the slowest point.
_BUDGETS, _UNREACHED = 24, 1.2
# How far below expectation the budgets begin, in standard deviations, and below the least that was measured. Without
# the first the curve of benchmarks/remat_groups.py ends at 41.5 MB instead of 32.8.
_DOUBTS, _BELOW = 1.5, 0.8


@dataclasses.dataclass(frozen=True)
class Posterior:
    """What is expected of each assignment, shape (assignments,) each.

    Attributes:
        bytes: Of the budget's kind.
        bytes_std: One standard deviation of that.
        cycles: Of a whole step.
        cycles_std: One standard deviation of that; 0 where cycles are the planner's own model.
    """

    bytes: np.ndarray
    bytes_std: np.ndarray
    cycles: np.ndarray
    cycles_std: np.ndarray


class Exploration:
    """Compiled points, and what they say of the others.

    Args:
        space: What can be compiled.
        measure_rules: Compiles a set of rules.
        of: The figure that budgets are about.
        plain_cycles: The planner's own count for the plain model.
        progress: Told of each compile before it begins.
    """

    def __init__(
        self,
        *,
        space: Space,
        measure_rules: Callable[[Rules], Measurement],
        of: BudgetKind,
        plain_cycles: float,
        progress: Callable[[str], None],
    ) -> None:
        self.space, self.measure_rules, self.of = space, measure_rules, of
        self.plain_cycles, self.progress = plain_cycles, progress
        self.points: dict[int, Point] = {}
        self.rejected: set[int] = set()
        self.measurements: dict[Rules, Measurement] = {}

    def compile_assignment(self, number: int) -> None:
        """Measure an assignment."""
        rules = write_rules(self.space, self.space.assignments[number])
        predicted = self._predict(number)
        self.progress(
            f"compile {len(self.points) + 1}: expecting {format_bytes(predicted.bytes)}, "
            f"{format_count(predicted.cycles)} cycles"
        )
        if rules not in self.measurements:
            try:
                self.measurements[rules] = self.measure_rules(rules)
            except RuleError:
                if self.space.assignments[number].group == 1:
                    raise
                # What lies between the blocks cannot be cut into groups: no group of this model can.
                self.rejected |= {n for n, other in enumerate(self.space.assignments) if other.group > 1}
                return
        self._add_point(number, rules, predicted)

    def add_known(self, measurements: Iterable[tuple[Rules, Measurement]]) -> None:
        """Take up what was compiled before, as far as it is one of this space's assignments."""
        known = dict(measurements)
        if not known:
            return
        numbers = {
            write_rules(self.space, a): number for number, a in reversed(list(enumerate(self.space.assignments)))
        }
        for rules, measured in known.items():
            if rules in numbers and numbers[rules] not in self.points:
                predicted = self._predict(numbers[rules])
                self.measurements[rules] = measured
                self._add_point(numbers[rules], rules, predicted)

    def _predict(self, number: int) -> Prediction:
        expected = self.compute_posterior()
        # The first error may be larger than what the model predicted, and nothing takes less than nothing.
        return Prediction(bytes=max(int(expected.bytes[number]), 0), cycles=float(expected.cycles[number]))

    def _add_point(self, number: int, rules: Rules, prediction: Prediction) -> None:
        measured = self.measurements[rules]
        time_taken = self.plain_cycles + self.space.cycles[number]
        if measured.estimated_cycles is not None:
            time_taken = float(measured.estimated_cycles) + self.space.link_cycles[number]
        elif not measured.fits:
            time_taken = float("inf")
        self.points[number] = Point(
            rules=rules,
            predicted=prediction,
            measured=measured,
            bytes=select_bytes(measured, self.of),
            cycles=float(time_taken),
            link_cycles=float(self.space.link_cycles[number]),
        )

    def compute_posterior(self) -> Posterior:
        """What the model and all that was measured say of each assignment."""
        fitting = {number: point for number, point in self.points.items() if point.measured.fits}
        cycles, certain = self.plain_cycles + self.space.cycles, np.zeros(len(self.space.assignments))
        if not fitting:
            return Posterior(self.space.bytes, certain, cycles, certain)
        by_bytes = self.space.correct_predictions("bytes", {n: float(p.bytes) for n, p in fitting.items()})
        if any(point.measured.estimated_cycles is None for point in fitting.values()):
            return Posterior(*by_bytes, cycles, certain)
        return Posterior(
            *by_bytes, *self.space.correct_predictions("cycles", {n: p.cycles for n, p in fitting.items()})
        )

    def _is_open(self, number: int) -> bool:
        return number not in self.points and number not in self.rejected

    def propose(self, limit: int | None, max_cycles: float | None) -> int | None:
        """The assignment to compile next for these limits, or None if none promises more."""
        expected = self.compute_posterior()
        open_ = np.array([self._is_open(number) for number in range(len(expected.bytes))])
        size, time = (expected.bytes, expected.bytes_std), (expected.cycles, expected.cycles_std)
        goal = time if max_cycles is None else size
        best = find_best_point(self.points.values(), limit, max_cycles)
        chance = open_.astype(float)
        for figure, most in ((size, limit), (time, max_cycles)):
            if most is not None:
                chance *= _compute_feasibility(*figure, most)
        if best is not None:
            reached = best.cycles if max_cycles is None else best.bytes
            return _select_most_promising(chance * _compute_expected_improvement(*goal, max(float(reached), 1.0)))
        if not open_.any():
            return None
        likely = np.flatnonzero(chance > _MIN_PROBABILITY)
        if len(likely):  # of those that most probably do, the best
            return int(likely[goal[0][likely].argmin()])
        fitting = [point for point in self.points.values() if point.measured.fits]
        if not fitting:  # what takes least
            return int(np.where(open_, expected.bytes, np.inf).argmin())
        # Nothing is expected to do: what comes nearer to the limit that is missed than all that was tried.
        late = max_cycles is not None and all(point.cycles > max_cycles for point in fitting)
        nearest = min(point.cycles if late else point.bytes for point in fitting)
        return _select_most_promising(
            open_ * _compute_expected_improvement(*(time if late else size), max(float(nearest), 1.0))
        )

    def propose_for_frontier(self) -> int | None:
        """The assignment that promises most at whatever budget, or None if none promises more."""
        expected = self.compute_posterior()
        open_ = np.array([number for number in range(len(expected.bytes)) if self._is_open(number)])
        fitting = [point for point in self.points.values() if point.measured.fits]
        if not len(open_):
            return None
        sizes, cycles = expected.bytes[open_], expected.cycles[open_]
        if not fitting:  # not even the plain model fits: what takes least
            return int(open_[sizes.argmin()])
        nothing = self.space.assignments.index(self.space.full_remat)
        if len(self.points) == 1 and nothing in open_:  # both ends are known before anything between them is judged
            return nothing
        most = max([1, *(point.bytes for point in fitting)])
        slowest = max(point.cycles for point in fitting)
        # Budgets that nothing is expected to keep count as well, as far as that is doubtful.
        lowest = float((sizes - _DOUBTS * expected.bytes_std[open_]).min())
        lowest = max(lowest, _BELOW * min(point.bytes for point in fitting), 1.0)
        limits = np.geomspace(min(lowest, most), most, _BUDGETS)
        found = [find_best_point(fitting, limit, None) for limit in limits]
        best = np.array([_UNREACHED * slowest if point is None else point.cycles for point in found])
        chance = _compute_feasibility(sizes[:, None], expected.bytes_std[open_][:, None], limits)
        # The part of the plane under the curve that each is expected to add, times the chance that it keeps the budget:
        # a gain at many budgets is worth more than at one.
        promised = chance * _compute_expected_improvement(cycles[:, None], expected.cycles_std[open_][:, None], best)
        found_at = _select_most_promising(promised.mean(axis=1))
        return None if found_at is None else int(open_[found_at])


def _select_most_promising(acquisition: np.ndarray) -> int | None:
    """The assignment from which most is expected, None if that is not worth a compile."""
    return int(acquisition.argmax()) if acquisition.max() > _MIN_GAIN else None


def _compute_feasibility(mean: np.ndarray, std: np.ndarray, limit: float | np.ndarray) -> np.ndarray:
    """How likely each stays within a limit."""
    return np.asarray(scipy.special.ndtr((limit - mean) / np.maximum(std, 1e-6 * np.maximum(limit, 1.0))))


def _compute_expected_improvement(mean: np.ndarray, std: np.ndarray, best: float | np.ndarray) -> np.ndarray:
    """How much less than what is reached is expected of each, as a part of it: the mean over a normal distribution.

    Known as the expected improvement (Mockus 1975); without doubt it is the difference, or 0.
    """
    spread = np.maximum(std, 1e-9 * best)
    z = (best - mean) / spread
    density = np.exp(-0.5 * z**2) / np.sqrt(2 * np.pi)
    return np.asarray(((best - mean) * scipy.special.ndtr(z) + spread * density) / best)


def find_best_point(points: Iterable[Point], limit: float | None, max_cycles: float | None) -> Point | None:
    """The best compiled point that keeps the limits: the fastest, or the smallest if a time is the limit."""
    kept: Sequence[Point] = [
        point
        for point in points
        if point.measured.fits
        and (limit is None or point.bytes <= limit)
        and (max_cycles is None or point.cycles <= max_cycles)
    ]
    return min(kept, key=lambda point: _make_sort_key(point.bytes, point.cycles, max_cycles), default=None)


def _make_sort_key(size: float, cycles: float, max_cycles: float | None) -> tuple[float, float]:
    return (cycles, size) if max_cycles is None else (size, cycles)
