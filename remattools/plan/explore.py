# SPDX-License-Identifier: Apache-2.0
"""Which assignment to compile next, and what the compiled ones say of the others.

Sits on `search` and `writing`. The planner's model proposes, the compiler disposes:
each measurement corrects the predictions of all that is not compiled yet.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import scipy

from ..errors import RuleError
from ..measure.measurement import Measurement, format_bytes, format_count
from ..rules.ruleset import Rules
from .budget import Of, bytes_of
from .result import Point, Prediction
from .search import Space
from .writing import rules_of

# Below this gain a further compile is not worth its time.
_GAIN = 0.002
# Budgets at which a frontier is asked whether it could be better, and what a budget that nothing keeps yet is taken
# for, in times of the slowest point.
_BUDGETS, _UNREACHED = 24, 1.5


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
        return Prediction(bytes=int(expected.bytes[number]), cycles=float(expected.cycles[number]))

    def _add(self, number: int, rules: Rules, predicted: Prediction) -> None:
        measured = self.by_rules[rules]
        time_taken = self.plain_cycles + self.space.cycles[number]
        if measured.estimated_cycles is not None:
            time_taken = float(measured.estimated_cycles)
        elif not measured.fits:
            time_taken = float("inf")
        self.points[number] = Point(
            rules=rules,
            predicted=predicted,
            measured=measured,
            bytes=bytes_of(measured, self.of),
            cycles=time_taken,
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
        sizes, cycles = expected.bytes, expected.cycles
        open_ = np.array([self._is_open(number) for number in range(len(sizes))])
        best = best_point(self.points.values(), limit, max_cycles)
        within = open_.copy()
        if limit is not None:
            within &= sizes <= limit
        if max_cycles is not None:
            within &= cycles <= max_cycles
        goal = cycles if max_cycles is None else sizes
        if best is not None:
            within &= goal < (1 - _GAIN) * (best.cycles if max_cycles is None else best.bytes)
        if within.any():
            return int(min(np.flatnonzero(within), key=lambda n: _order(float(sizes[n]), float(cycles[n]), max_cycles)))
        if best is not None or not open_.any():
            return None
        # Nothing is expected to do: the least there is will tell.
        least = sizes if max_cycles is None else cycles
        nearest = int(min(np.flatnonzero(open_), key=lambda n: least[n]))
        tried = [point.bytes if max_cycles is None else point.cycles for point in self.points.values()]
        return nearest if least[nearest] < min(tried) else None

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
        limits = np.geomspace(max(min(float(sizes.min()), most), 1.0), most, _BUDGETS)
        found = [best_point(fitting, limit, None) for limit in limits]
        best = np.array([_UNREACHED * slowest if point is None else point.cycles for point in found])
        room = (limits - sizes[:, None]) / np.maximum(expected.bytes_doubt[open_][:, None], 1e-6 * most)
        chance = scipy.special.ndtr(room)
        # The part of the plane under the curve that each would add, times the chance that it keeps the budget: a gain
        # at many budgets is worth more than at one. If none is expected to add anything, what is least known may.
        for hoped in (cycles, cycles - expected.cycles_doubt[open_]):
            promised = (np.maximum(1.0 - hoped[:, None] / best, 0.0) * chance).mean(axis=1)
            if promised.max() > _GAIN / _BUDGETS:
                return int(open_[promised.argmax()])
        return None


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
