# SPDX-License-Identifier: Apache-2.0
"""The compiled points of one search, and what they say of the assignments that are not compiled yet.

Sits on `space`, `next_compile` and `to_rules`. Each measurement corrects the predictions of all other assignments.
"""

import dataclasses
from collections.abc import Callable, Iterable

import numpy as np

from ...compiler.report import Measurement, format_count
from ...errors import RuleError
from ...rules.ruleset import Rules
from ...terminal.progress import CompileLog
from ...text import format_bytes
from ..budget import BudgetKind, select_bytes
from ..result import Point, Prediction, describe_rules
from .next_compile import Posterior, choose_for_frontier, choose_for_limits
from .space import Space
from .to_rules import write_rules


class Exploration:
    """Compiled points, and what is expected of the other assignments.

    Args:
        space: What can be compiled.
        measure_rules: Compiles a set of rules.
        of: What budgets are about.
        plain_cycles: Cycles of the plain model by the planner's time model.
        log: Says what is compiled.

    Attributes:
        points: The compiled points by the numbers of their assignments, in the order of compiling.
        others: Compiled points that are not an assignment, by their rules.
        rejected: Numbers of assignments that this program does not allow.
        measurements: All measurements by rules.
    """

    def __init__(
        self,
        *,
        space: Space,
        measure_rules: Callable[[Rules], Measurement],
        of: BudgetKind,
        plain_cycles: float,
        log: CompileLog,
    ) -> None:
        self.space, self.measure_rules = space, measure_rules
        self.of: BudgetKind = of
        self.plain_cycles, self.log = plain_cycles, log
        self.points: dict[int, Point] = {}
        self.others: dict[Rules, Point] = {}
        self.rejected: set[int] = set()
        self.measurements: dict[Rules, Measurement] = {}

    @property
    def all_points(self) -> tuple[Point, ...]:
        """All compiled points, the plain model first."""
        return (*self.points.values(), *self.others.values())

    def add_plain(self, measured: Measurement) -> None:
        """Add the plain model, which was compiled before the assignments were known."""
        number, rules = self.space.assignments.index(self.space.plain), Rules()
        self.measurements[rules] = measured
        self._add_point(number, rules, None)  # nothing was measured yet that predictions could be corrected by

    def compile_assignment(self, number: int, *, remaining: int | None = None) -> None:
        """Compile and measure an assignment.

        Args:
            number: The number of the assignment.
            remaining: The most compiles that follow it.

        Raises:
            RuleError: If the program does not allow its rules; groups are then rejected without an error.
        """
        rules = write_rules(self.space, self.space.assignments[number])
        predicted = self._predict(number)
        if rules not in self.measurements:
            try:
                self._measure(rules, predicted, remaining)
            except RuleError:
                if self.space.assignments[number].group == 1:
                    raise
                # The code between the blocks cannot be cut into groups: no group of this model can be compiled.
                self.rejected |= {n for n, other in enumerate(self.space.assignments) if other.group > 1}
                return
        self._add_point(number, rules, predicted)

    def compile_rules(self, rules: Rules, *, remaining: int | None = None) -> None:
        """Compile and measure rules that save nothing, but on other modules than those of the assignments.

        Raises:
            RuleError: If the program does not allow them.
        """
        like = self.space.assignments.index(self.space.full_remat)
        predicted = self._predict(like)
        if rules not in self.measurements:
            self._measure(rules, predicted, remaining)
        self.others[rules] = self._make_point(like, rules, predicted)

    def _measure(self, rules: Rules, predicted: Prediction | None, remaining: int | None) -> None:
        expected = (
            ""
            if predicted is None
            else f"; expecting {format_bytes(predicted.bytes)}, {format_count(predicted.cycles)} cycles"
        )
        with self.log.compile(describe_rules(rules) + expected, remaining=remaining):
            self.measurements[rules] = self.measure_rules(rules)

    def add_measurements(self, measurements: Iterable[tuple[Rules, Measurement]]) -> None:
        """Add points that were compiled earlier, as far as they are assignments of this space."""
        earlier = dict(measurements)
        if not earlier:
            return
        numbers = {
            write_rules(self.space, a): number for number, a in reversed(list(enumerate(self.space.assignments)))
        }
        for rules, measured in earlier.items():
            if rules in numbers and numbers[rules] not in self.points:
                predicted = self._predict(numbers[rules])
                self.measurements[rules] = measured
                self._add_point(numbers[rules], rules, predicted)

    def _predict(self, number: int) -> Prediction | None:
        if not self.points:
            return None
        expected = self.compute_posterior()
        # The correction may be larger than the prediction; nothing takes less than 0 bytes.
        return Prediction(bytes=max(int(expected.bytes[number]), 0), cycles=float(expected.cycles[number]))

    def _add_point(self, number: int, rules: Rules, prediction: Prediction | None) -> None:
        self.points[number] = self._make_point(number, rules, prediction)
        if self.points[number].measured.estimated_cycles is not None:
            self._update_unknown_cycles()

    def _make_point(self, number: int, rules: Rules, prediction: Prediction | None) -> Point:
        measured = self.measurements[rules]
        # Where the compiler has no estimate, what the other points say of this one.
        cycles = self.compute_posterior().cycles[number]
        if measured.estimated_cycles is not None:
            cycles = float(measured.estimated_cycles) + self.space.link_cycles[number]
        elif not measured.fits:
            cycles = float("inf")
        return Point(
            rules=rules,
            predicted=prediction,
            measured=measured,
            bytes=select_bytes(measured, self.of),
            cycles=float(cycles),
            link_cycles=float(self.space.link_cycles[number]),
        )

    def _update_unknown_cycles(self) -> None:
        """Set the cycles of the points for which the compiler has no estimate to what the others say of them."""
        expected = self.compute_posterior().cycles
        for number, point in self.points.items():
            if point.measured.fits and point.measured.estimated_cycles is None:
                self.points[number] = dataclasses.replace(point, cycles=float(expected[number]))

    def compute_posterior(self) -> Posterior:
        """Return what the predictions and all measurements say of each assignment."""
        compiled = {number: point for number, point in self.points.items() if point.measured.fits}
        cycles, no_std = self.plain_cycles + self.space.cycles, np.zeros(len(self.space.assignments))
        # While everything runs out of memory, what the compiler says it needs is all that is known.
        sized = compiled or {n: p for n, p in self.points.items() if p.measured.peak_bytes}
        if not sized:
            return Posterior(self.space.bytes, no_std, cycles, no_std)
        size = self.space.correct_predictions("bytes", {n: float(p.bytes) for n, p in sized.items()})
        known = {n: p.cycles for n, p in compiled.items() if p.measured.estimated_cycles is not None}
        if not known:
            return Posterior(*size, cycles, no_std)
        return Posterior(*size, *self.space.correct_predictions("cycles", known))

    def _find_open(self) -> np.ndarray:
        """Return whether each assignment may be compiled, shape (assignments,)."""
        numbers = range(len(self.space.assignments))
        return np.array([number not in self.points and number not in self.rejected for number in numbers])

    def propose(self, max_bytes: int | None, max_cycles: float | None) -> int | None:
        """Return the assignment to compile next for these limits, or None if none promises an improvement."""
        return choose_for_limits(
            self.compute_posterior(),
            self._find_open(),
            self.all_points,
            max_bytes=max_bytes,
            max_cycles=max_cycles,
        )

    def propose_for_frontier(self) -> int | None:
        """Return the assignment that promises most over all budgets, or None if none promises an improvement."""
        is_open = self._find_open()
        ends = [self.space.assignments.index(assignment) for assignment in self.space.smallest]
        return choose_for_frontier(
            self.compute_posterior(),
            is_open,
            self.points.values(),
            full_remat=next((number for number in ends if is_open[number]), ends[0]),
        )
