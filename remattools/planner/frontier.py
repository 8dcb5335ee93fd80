# SPDX-License-Identifier: Apache-2.0
"""The memory-time curve of one model: compiled once, it answers every budget.

Sits on `explore`. Plans are picked from compiled points only.
"""

import dataclasses
import os
from collections.abc import Callable
from typing import Any

from ..compiler.targets import Target
from ..errors import BudgetError
from ..text import format_bytes
from .budget import BudgetKind, compute_budget_bytes, require_budget, require_positive
from .result import Plan, Point, find_frontier, format_footer, format_table, plot_points
from .search.next_compile import find_best_point


@dataclasses.dataclass(frozen=True, kw_only=True)
class Frontier:
    """Compiled points of one model, loss, batch and target; `str()` is a table.

    Attributes:
        points: Every set of rules that was compiled, the plain model first.
        of: What budgets are about.
        time_by: "estimated_cycles" (the compiler's) or "model" (the planner's own).
        subject: What it was made for, for people.
        target: What was compiled for.
        holding: What is alive at the fullest moment under the rules of a point.
        ended: "max_compiles", "converged" (nothing promised more), "time_limit" or "interrupted" (Ctrl-C).
    """

    points: tuple[Point, ...]
    of: BudgetKind
    time_by: str
    subject: str
    target: Target = dataclasses.field(repr=False)
    holding: Callable[[Point], str] = dataclasses.field(repr=False)
    ended: str = "converged"

    @property
    def best(self) -> tuple[Point, ...]:
        """The points that no other beats in both, by rising memory."""
        return find_frontier(self.points)

    @property
    def least_bytes(self) -> int:
        """The smallest budget that can be kept."""
        return min(point.bytes for point in self.points)

    @property
    def plain_bytes(self) -> int:
        """What the plain model takes."""
        return self.points[0].bytes

    def plan(self, budget: int | float | str | None = None, *, max_cycles: float | None = None) -> Plan:
        """The best of the compiled points; nothing is compiled.

        Args:
            budget: As in `remattools.plan`.
            max_cycles: Likewise.

        Raises:
            BudgetError: If the budget cannot be read, or no point keeps it.
        """
        check_limits(budget, max_cycles)
        limit = (
            None if budget is None else compute_budget_bytes(budget, target=self.target, plain_bytes=self.plain_bytes)
        )
        best = find_best_point(self.points, limit, max_cycles)
        if best is None:
            raise self._make_unreachable_error(limit, max_cycles)
        return Plan(
            rules=best.rules,
            predicted=best.predicted,
            measured=best.measured,
            points=self.points,
            budget_bytes=limit,
            of=self.of,
            time_by=self.time_by,
            subject=self.subject,
            ended=self.ended,
        )

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        points = [point.as_dict() for point in self.points]
        return {"of": self.of, "time_by": self.time_by, "ended": self.ended, "points": points}

    def table(self) -> str:
        """All points by memory; those that no other beats are marked."""
        return format_table(self.points, self.of, None)

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw cycles against memory; PNG or SVG, by the file's ending.

        Raises:
            MeasureError: If matplotlib is not installed.
        """
        plot_points(self.points, path, of=self.of, time_by=self.time_by, budget_bytes=None)

    def __str__(self) -> str:
        return f"{self.table()}\n{format_footer(self.points, self.time_by, self.ended)}"

    def _make_unreachable_error(self, limit: int | None, max_cycles: float | None) -> BudgetError:
        kept = [point for point in self.points if limit is None or point.bytes <= limit]
        number = f"{len(self.points)} point{'s' * (len(self.points) != 1)}"
        compiles = f"more compiles than for {number} (max_compiles=, --max-compiles)"
        if self.ended == "time_limit":
            compiles = "more time than time_limit_s (--time-limit), which ended the search"
        if max_cycles is not None and kept:
            fastest = min(kept, key=lambda point: point.cycles)
            return BudgetError(
                what=f"no compiled rules stay within {max_cycles:,.0f} cycles"
                + ("." if limit is None else f" and {format_bytes(limit)}."),
                why=("the fastest" if limit is None else "the fastest of those that keep the budget")
                + f" takes {fastest.cycles:,.0f} cycles and {format_bytes(fastest.bytes)}.",
                fix=f"max_cycles={int(fastest.cycles) + 1}, {compiles}"
                + ("." if limit is None else ", or a larger budget."),
            )
        least = min(self.points, key=lambda point: point.bytes)
        return BudgetError(
            what=f"no compiled rules stay within {format_bytes(limit)} of {self.of}; the least is "
            f"{least.bytes} bytes ({format_bytes(least.bytes)}); "
            f"the arguments are {format_bytes(least.measured.argument_bytes)}.",
            why=f"at the fullest moment these are alive: {self.holding(least)}.",
            fix=f"budget={least.bytes}, {compiles}, a smaller batch, "
            "or a loss that makes its largest values in pieces.",
        )


def check_limits(budget: Any, max_cycles: float | None) -> None:
    """Refuse a plan without any limit, or with one that cannot be read.

    Raises:
        BudgetError: If there is none.
    """
    if budget is not None:
        require_budget(budget)
    if budget is None and max_cycles is None:
        raise BudgetError(
            what="neither a budget nor max_cycles was given.",
            why="a plan is the best there is within a limit.",
            fix='budget="12GiB", or budget=0.5 for half of what the plain model takes.',
        )
    if max_cycles is not None:
        require_positive("max_cycles", max_cycles, "cycles of a whole step", "250e6")
