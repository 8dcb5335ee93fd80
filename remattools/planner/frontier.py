# SPDX-License-Identifier: Apache-2.0
"""The memory-time curve of one model: compiled once, it answers every budget.

Sits on `search`. Plans are chosen among compiled points only.
"""

import dataclasses
import os
from typing import Any

from ..compiler.targets import Target
from ..errors import BudgetError
from ..text import format_bytes
from .budget import BudgetKind, compute_budget_bytes, require_budget, require_positive
from .result import EndReason, Plan, Point, TimeSource, find_frontier, format_footer, format_points, plot_points
from .search.next_compile import find_best_point
from .unreachable import ProgramFacts, make_unreachable_error


@dataclasses.dataclass(frozen=True, kw_only=True)
class Frontier:
    """Compiled points of one model, loss, batch and target; `str()` is a table.

    Attributes:
        points: Every set of rules that was compiled, the plain model first.
        of: What budgets are about: "peak" or "temp".
        time_by: Where cycles come from: "estimated_cycles" (the compiler) or "model" (the planner's time model).
        subject: The model and the batch, for people.
        target: What the points were compiled for.
        program: What else is known of the program, for errors.
        has_minimum: Whether saving nothing on every block, also in groups, was compiled.
        ended: What ended the search: "max_compiles", "converged" (nothing promised an improvement), "time_limit" or
            "interrupted" (Ctrl-C).
        notes: What else to know, such as the cost of random bits.

    Example:
        >>> import jax, jax.numpy as jnp, remattools as rt
        >>> from flax import nnx
        >>> class MLP(nnx.Module):
        ...     def __init__(self):
        ...         self.layers = nnx.List([nnx.Linear(16, 16, rngs=nnx.Rngs(i)) for i in range(2)])
        ...     def __call__(self, x):
        ...         for layer in self.layers:
        ...             x = jnp.sin(layer(x))
        ...         return x
        >>> model, x = nnx.eval_shape(MLP), jax.ShapeDtypeStruct((64, 16), jnp.float32)
        >>> curve = rt.frontier(lambda m, x: m(x).sum(), model, x, target="cpu", max_compiles=2)
        >>> curve.least_bytes <= curve.plain_bytes
        True
        >>> curve.plan(budget=1.0).budget_bytes == curve.plain_bytes
        True
    """

    points: tuple[Point, ...]
    of: BudgetKind
    time_by: TimeSource
    subject: str
    target: Target = dataclasses.field(repr=False)
    program: ProgramFacts = dataclasses.field(repr=False)
    ended: EndReason = "converged"
    has_minimum: bool = True
    notes: tuple[str, ...] = ()

    @property
    def best(self) -> tuple[Point, ...]:
        """The points that no other point beats in both memory and time, by rising memory."""
        return find_frontier(self.points)

    @property
    def least_bytes(self) -> int:
        """The minimum reached: the smallest budget with a plan."""
        return min(self.points, key=lambda point: (not point.measured.fits, point.bytes)).bytes

    @property
    def plain_bytes(self) -> int:
        """What the plain model takes."""
        return self.points[0].bytes

    def plan(self, budget: int | float | str | None = None, *, max_cycles: float | None = None) -> Plan:
        """Return the best of the compiled points within a budget; nothing is compiled.

        Args:
            budget: Bytes, a string such as `"12GiB"`, a fraction of what the plain model takes (`0.5`), or `"fit"` (the
                device's memory minus a margin). None if `max_cycles` is the only limit.
            max_cycles: A time limit, in cycles of a whole step: the smallest point within it is returned. Without it,
                the fastest point within the budget.

        Raises:
            BudgetError: If neither limit is given, one is not valid, or no point is within the limits.
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
            notes=self.notes,
        )

    def as_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        points = [point.as_dict() for point in self.points]
        return {
            "of": self.of,
            "time_by": self.time_by,
            "ended": self.ended,
            "notes": list(self.notes),
            "points": points,
        }

    def table(self) -> str:
        """Return a table of all points by memory; those that no other point beats are marked."""
        return format_points(self.points, self.of, None)

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Plot cycles against memory.

        Args:
            path: Where to write the image; PNG or SVG, by the extension.

        Raises:
            MeasureError: If matplotlib is not installed.
        """
        plot_points(self.points, path, of=self.of, time_by=self.time_by, budget_bytes=None)

    def __str__(self) -> str:
        return f"{self.table()}\n{format_footer(self.points, self.time_by, self.ended, self.notes)}"

    def _make_unreachable_error(self, limit: int | None, max_cycles: float | None) -> BudgetError:
        within = [point for point in self.points if limit is None or point.bytes <= limit]
        number = f"{len(self.points)} point{'s' * (len(self.points) != 1)}"
        compiles = f"more compiles than these {number} (max_compiles=, --max-compiles)"
        if self.ended == "time_limit":
            compiles = "more time than time_limit_s (--time-limit), which ended the search"
        if max_cycles is not None and within:
            fastest = min(within, key=lambda point: point.cycles)
            return BudgetError(
                what=f"no compiled rules stay within {max_cycles:,.0f} cycles"
                + ("." if limit is None else f" and {format_bytes(limit)}."),
                why=("the fastest" if limit is None else "the fastest within the budget")
                + f" takes {fastest.cycles:,.0f} cycles and {format_bytes(fastest.bytes)}.",
                fix=f"max_cycles={int(fastest.cycles) + 1}, {compiles}"
                + ("." if limit is None else ", or a larger budget."),
            )
        assert limit is not None  # a time limit alone was met or missed above
        return make_unreachable_error(
            self.points,
            limit,
            self.of,
            self.ended,
            self.program,
            skipped=not self.has_minimum,
            notes=self.notes,
        )


def check_limits(budget: Any, max_cycles: float | None) -> None:
    """Raise an error for a plan without a limit, or with one that is not valid.

    Args:
        budget: What the user passed as the budget; None for none.
        max_cycles: What the user passed as the time limit; None for none.

    Raises:
        BudgetError: If both are None, or one is not valid.
    """
    if budget is not None:
        require_budget(budget)
    if budget is None and max_cycles is None:
        raise BudgetError(
            what="neither a budget nor max_cycles was given.",
            why="a plan is the best set of rules within a limit.",
            fix='budget="12GiB", or budget=0.5 for half of what the plain model takes.',
        )
    if max_cycles is not None:
        require_positive("max_cycles", max_cycles, "cycles of a whole step", "250e6")
