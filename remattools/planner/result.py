# SPDX-License-Identifier: Apache-2.0
"""A plan: rules with the figures that the compiler gave for them."""

import dataclasses
import os
from collections.abc import Iterable
from typing import Any

from ..analysis import plot
from ..compiler.report import Measurement, format_count
from ..rules.ruleset import Rules
from ..text import format_bytes
from .budget import BudgetKind


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prediction:
    """What the planner's model said before it was compiled.

    Attributes:
        bytes: Of the budget's kind.
        cycles: Of a whole step.
    """

    bytes: int
    cycles: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Point:
    """One compiled set of rules.

    Attributes:
        rules: Empty for the plain model.
        predicted: What was expected of them.
        measured: What the compiler said.
        bytes: The figure that the budget is about.
        cycles: The compiler's estimate, and `link_cycles`; where it has none, the planner's model.
        link_cycles: What transfers to the host's memory and back take beyond what runs meanwhile. By the planner's
            model: compilers do not count them.
    """

    rules: Rules
    predicted: Prediction
    measured: Measurement
    bytes: int
    cycles: float
    link_cycles: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "rules": self.rules.to_toml(),
            "bytes": self.bytes,
            "cycles": self.cycles,
            "link_cycles": self.link_cycles,
            "predicted": dataclasses.asdict(self.predicted),
            "measured": self.measured.as_dict(),
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """Rules that keep a budget, verified by the compiler; `str()` is a table.

    Attributes:
        rules: To be applied, or written by `to_toml`.
        predicted: What the planner expected of them.
        measured: What the compiler said of them.
        points: Every set of rules that was compiled, in the order of compiling.
        budget_bytes: The budget, None if only a time was asked for.
        of: What the budget is about.
        time_by: "estimated_cycles" (the compiler's) or "model" (the planner's own).
        subject: What it was made for, for people.
        ended: What ended the search: "max_compiles", "converged" (nothing promised more), "time_limit" or "interrupted"
            (Ctrl-C).
    """

    rules: Rules
    predicted: Prediction
    measured: Measurement
    points: tuple[Point, ...]
    budget_bytes: int | None
    of: BudgetKind
    time_by: str
    subject: str
    ended: str = "converged"

    @property
    def frontier(self) -> tuple[Point, ...]:
        """The compiled points that no other beats in both, by rising memory."""
        return find_frontier(self.points)

    def to_toml(self) -> str:
        """The rules as a rule file that says where it comes from."""
        lines = [
            f"made by remattools.plan for {self.subject}",
            f"target {self.measured.target}, budget {format_bytes(self.budget_bytes)} of {self.of}"
            if self.budget_bytes is not None
            else f"target {self.measured.target}, the least {self.of} within a time",
            f"measured: temp {self.measured.temp_bytes} B, total {self.measured.total_bytes} B"
            + (
                "" if self.measured.estimated_cycles is None else f", {self.measured.estimated_cycles} estimated cycles"
            ),
        ]
        if any(action and action.offload for _, action in self.rules):
            beyond = next(point.link_cycles for point in self.points if point.rules == self.rules)
            lines.append(
                f"transfers to the host, by the planner's model: {beyond:.0f} cycles beyond what runs meanwhile"
            )
        if describe_early_end(self.ended):
            lines.append(describe_early_end(self.ended).removeprefix("; "))
        if not len(self.rules):
            lines.append("the plain model keeps the budget: no rule is needed")
        return "\n".join([*(f"# {line}" for line in lines), "", self.rules.to_toml()])

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        points = [point.as_dict() | {"chosen": point.rules == self.rules} for point in self.points]
        return {
            "budget_bytes": self.budget_bytes,
            "of": self.of,
            "time_by": self.time_by,
            "ended": self.ended,
            "points": points,
        }

    def table(self) -> str:
        """All compiled points by memory; the plan's own is marked."""
        return format_table(self.points, self.of, self.rules)

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw cycles against memory of all compiled points; PNG or SVG, by the file's ending.

        Raises:
            MeasureError: If matplotlib is not installed.
        """
        plot_points(self.points, path, of=self.of, time_by=self.time_by, budget_bytes=self.budget_bytes)

    def __str__(self) -> str:
        return f"{self.table()}\n{format_footer(self.points, self.time_by, self.ended)}"


def describe_early_end(ended: str) -> str:
    """What to say of a search that was ended from outside; nothing of others."""
    reasons = {"interrupted": "Ctrl-C", "time_limit": "its time limit"}
    return f"; the search was ended by {reasons[ended]}: more compiles may find better" if ended in reasons else ""


def format_footer(points: Iterable[Point], time_by: str, ended: str) -> str:
    """What to say below a table of points."""
    points = tuple(points)
    below = f"time by {time_by}; target {points[0].measured.target}{describe_early_end(ended)}"
    on_chip = sum(point.measured.temporaries_on_chip for point in points)
    if on_chip:
        below += (
            f"\ntemporaries of {on_chip} of {len(points)} points lie in the chip's own memory (VMEM), which no figure "
            "above counts: of so small a program they say little"
        )
    return below


def find_frontier(points: Iterable[Point]) -> tuple[Point, ...]:
    """The points that no other beats in both, by rising memory."""
    best: list[Point] = []
    for point in sorted(points, key=lambda p: (p.bytes, p.cycles)):
        if point.measured.fits and (not best or point.cycles < best[-1].cycles):
            best.append(point)
    return tuple(best)


def format_table(points: Iterable[Point], of: BudgetKind, chosen: Rules | None) -> str:
    """Points by memory, those of the frontier and the chosen one marked."""
    points = tuple(points)
    lines = [f"{'':2}{of:>12}{'cycles':>10}{'predicted':>14}{'':>10}  rules"]
    frontier = find_frontier(points)
    for point in sorted(points, key=lambda p: p.bytes):
        mark = "->" if point.rules == chosen else "* " if point in frontier else "  "
        rules = "; ".join(_format_rule(pattern.text, action) for pattern, action in point.rules) or "plain"
        if point.link_cycles:
            rules += f" (transfers by the planner's model: {format_count(point.link_cycles)} cycles)"
        size = format_bytes(point.bytes) if point.measured.fits else "no fit"
        lines.append(
            f"{mark}{size:>12}{format_count(point.cycles):>10}{format_bytes(point.predicted.bytes):>14}"
            f"{format_count(point.predicted.cycles):>10}  {rules}"
        )
    return "\n".join(lines)


def plot_points(
    points: Iterable[Point], path: str | os.PathLike[str], *, of: BudgetKind, time_by: str, budget_bytes: int | None
) -> None:
    """Draw cycles against memory."""
    points = tuple(points)
    with plot.open_figure(path) as axes:
        drawn = [point for point in points if point.measured.fits]
        axes.plot([p.bytes / 2**20 for p in drawn], [p.cycles / 1e6 for p in drawn], "o", color="tab:orange")
        line = find_frontier(points)
        axes.step([p.bytes / 2**20 for p in line], [p.cycles / 1e6 for p in line], where="post", color="gray")
        if budget_bytes is not None:
            axes.axvline(budget_bytes / 2**20, linestyle=":", color="black")
        axes.set_xlabel(f"{of}, MiB")
        axes.set_ylabel("million cycles" + (" by the planner's model" if time_by == "model" else ""))


def _format_rule(pattern: str, action: Any) -> str:
    kept = f"keep {len(action.save)} names" if action.save else "nothing"
    kept = f"offload {len(action.offload)} names" if action.offload else kept
    return f"{pattern}: {kept}" + (f", {action.group} in a region" if action.group != 1 else "")
