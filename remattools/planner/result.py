# SPDX-License-Identifier: Apache-2.0
"""A plan: rules with what the compiler measured for them; tables and plots of compiled points."""

import dataclasses
import math
import os
import pathlib
from collections.abc import Iterable
from typing import Any, Literal

from ..analysis import plot
from ..compiler.cache import get_version
from ..compiler.report import Measurement, format_count
from ..rules.ruleset import Rules
from ..text import format_bytes, format_table
from .budget import BudgetKind

TimeSource = Literal["estimated_cycles", "model"]
EndReason = Literal["max_compiles", "converged", "time_limit", "interrupted"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prediction:
    """What the planner expected of rules before they were compiled.

    Attributes:
        bytes: Bytes that the budget is about.
        cycles: Cycles of a whole step.
    """

    bytes: int
    cycles: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Point:
    """One compiled set of rules.

    Attributes:
        rules: The rules; empty for the plain model.
        predicted: What the planner expected of them; None for the plain model, which is compiled first: only
            measurements make predictions good enough to show.
        measured: What the compiler measured.
        bytes: The measured bytes that the budget is about.
        cycles: Cycles of a whole step: the compiler's estimate plus `link_cycles`; where the compiler gives none, the
            planner's time model.
        link_cycles: Cycles that transfers to the host's memory and back take beyond the computation that they overlap
            with. By the planner's time model, since compilers do not count them.
    """

    rules: Rules
    predicted: Prediction | None
    measured: Measurement
    bytes: int
    cycles: float
    link_cycles: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {
            "rules": self.rules.to_toml(),
            "bytes": self.bytes,
            "cycles": self.cycles,
            "link_cycles": self.link_cycles,
            "predicted": None if self.predicted is None else dataclasses.asdict(self.predicted),
            "measured": self.measured.as_dict(),
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """Rules within a budget, verified by the compiler; `str()` is a table.

    Attributes:
        rules: The rules, for `apply`, or for a file by `to_toml`.
        predicted: What the planner expected of them; None where the plain model is the plan.
        measured: What the compiler measured for them.
        points: Every set of rules that was compiled, in the order of compiling.
        budget_bytes: The budget in bytes; None if there was only a time limit.
        of: What the budget is about: "peak" or "temp".
        time_by: Where cycles come from: "estimated_cycles" (the compiler) or "model" (the planner's time model).
        subject: The model and the batch, for people.
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
        >>> plan = rt.plan(lambda m, x: m(x).sum(), model, x, budget=1.0, target="cpu", max_compiles=2)
        >>> plan.measured.total_bytes <= plan.budget_bytes
        True
        >>> rt.Rules.from_toml(plan.to_toml()) == plan.rules
        True
    """

    rules: Rules
    predicted: Prediction | None
    measured: Measurement
    points: tuple[Point, ...]
    budget_bytes: int | None
    of: BudgetKind
    time_by: TimeSource
    subject: str
    ended: EndReason = "converged"
    notes: tuple[str, ...] = ()

    @property
    def frontier(self) -> tuple[Point, ...]:
        """The compiled points that no other point beats in both memory and time, by rising memory."""
        return find_frontier(self.points)

    def to_toml(self) -> str:
        """Return the rules as a rule file, with comments that say where they come from."""
        lines = [
            f"made by remattools.plan for {self.subject}",
            f"target {self.measured.target}, budget {format_bytes(self.budget_bytes)} of {self.of}"
            if self.budget_bytes is not None
            else f"target {self.measured.target}, the minimum {self.of} within a time limit",
            f"compiled with {', '.join(_list_versions(self.measured.target))}",
            f"measured: {_format_measurement(self.measured)}",
            f"the plain model: {_format_measurement(self.points[0].measured)}",
        ]
        if any(action and action.offload for _, action in self.rules):
            beyond = next(point.link_cycles for point in self.points if point.rules == self.rules)
            lines.append(f"transfers to the host, by the planner's time model: {beyond:.0f} cycles that nothing hides")
        if describe_early_end(self.ended):
            lines.append(describe_early_end(self.ended).removeprefix("; "))
        if not len(self.rules):
            lines.append("the plain model is within the budget: no rule is needed")
        return "\n".join([*(f"# {line}" for line in lines), "", self.rules.to_toml()])

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write the rules as a rule file, which `Rules.load` reads.

        Args:
            path: The file; one that exists is replaced.
        """
        pathlib.Path(path).write_text(self.to_toml(), encoding="utf-8")

    def as_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        points = [point.as_dict() | {"chosen": point.rules == self.rules} for point in self.points]
        return {
            "budget_bytes": self.budget_bytes,
            "of": self.of,
            "time_by": self.time_by,
            "ended": self.ended,
            "notes": list(self.notes),
            "points": points,
        }

    def table(self) -> str:
        """Return a table of all compiled points by memory; the plan's point is marked."""
        return format_points(self.points, self.of, self.rules)

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Plot cycles against memory of all compiled points.

        Args:
            path: Where to write the image; PNG or SVG, by the extension.

        Raises:
            MeasureError: If matplotlib is not installed.
        """
        plot_points(self.points, path, of=self.of, time_by=self.time_by, budget_bytes=self.budget_bytes)

    def __str__(self) -> str:
        return f"{self.table()}\n{format_footer(self.points, self.time_by, self.ended, self.notes)}"


def _list_versions(target: str) -> list[str]:
    """Return what the measurements depend on, each with its version; the compiler of a TPU is in libtpu."""
    names = ["nnx-checkpointing", "jax", "flax", *(["libtpu"] if target.startswith("tpu") else [])]
    versions = {"remattools" if name == "nnx-checkpointing" else name: get_version(name) for name in names}
    return [f"{name} {version}" for name, version in versions.items() if version]


def _format_measurement(measured: Measurement) -> str:
    if not measured.fits:
        return "runs out of memory"
    cycles = "" if measured.estimated_cycles is None else f", {measured.estimated_cycles} estimated cycles"
    return f"temp {measured.temp_bytes} B, total {measured.total_bytes} B{cycles}"


def describe_early_end(ended: EndReason) -> str:
    """Return a remark on a search that the user or a limit ended early; empty for others."""
    reasons = {"interrupted": "Ctrl-C", "time_limit": "its time limit"}
    return (
        f"; the search was ended by {reasons[ended]}: more compiles may find better rules" if ended in reasons else ""
    )


def format_footer(points: Iterable[Point], time_by: TimeSource, ended: EndReason, notes: Iterable[str] = ()) -> str:
    """Return what stands below a table of points."""
    points = tuple(points)
    below = f"time by {time_by}; target {points[0].measured.target}{describe_early_end(ended)}"
    on_chip = sum(point.measured.temporaries_on_chip for point in points)
    if on_chip:
        below += (
            f"\ntemporaries of {on_chip} of {len(points)} points are in on-chip memory (VMEM), which is not counted "
            "above: for programs this small the memory column says little"
        )
    return "\n".join([below, *(f"note: {note}" for note in notes)])


def find_frontier(points: Iterable[Point]) -> tuple[Point, ...]:
    """Return the points that no other point beats in both memory and time, by rising memory."""
    best: list[Point] = []
    for point in sorted(points, key=lambda p: (p.bytes, p.cycles)):
        if point.measured.fits and (not best or point.cycles < best[-1].cycles):
            best.append(point)
    return tuple(best)


def format_points(points: Iterable[Point], of: BudgetKind, chosen: Rules | None) -> str:
    """Return a table of points by memory; those of the frontier and the chosen one are marked."""
    points = tuple(points)
    frontier = find_frontier(points)
    rows = []
    for point in sorted(points, key=lambda p: p.bytes):
        rules = describe_rules(point.rules)
        if point.link_cycles:
            rules += f" (transfers by the planner's time model: {format_count(point.link_cycles)} cycles)"
        rows.append(
            (
                "->" if point.rules == chosen else "*" if point in frontier else "",
                format_bytes(point.bytes) if point.measured.fits else f"OOM {_format_needed(point)}".rstrip(),
                format_count(point.cycles if math.isfinite(point.cycles) else None),
                *(
                    ("-", "-")
                    if point.predicted is None
                    else (format_bytes(point.predicted.bytes), format_count(point.predicted.cycles))
                ),
                rules,
            )
        )
    columns = ("", of, "cycles", "predicted", "", "rules")  # predicted bytes, then predicted cycles
    return format_table(columns, rows, numeric=columns[1:-1])


def _format_needed(point: Point) -> str:
    """Return what the compiler says that a program needs which runs out of memory; "" if it does not say."""
    refused = point.measured.out_of_memory
    return format_bytes(point.bytes) if refused is not None and refused.needed_bytes else ""


def plot_points(
    points: Iterable[Point],
    path: str | os.PathLike[str],
    *,
    of: BudgetKind,
    time_by: TimeSource,
    budget_bytes: int | None,
) -> None:
    """Plot cycles against memory."""
    points = tuple(points)
    with plot.open_figure(path) as axes:
        drawn = [point for point in points if point.measured.fits]
        axes.plot([p.bytes / 2**20 for p in drawn], [p.cycles / 1e6 for p in drawn], "o", color="tab:orange")
        line = find_frontier(points)
        axes.step([p.bytes / 2**20 for p in line], [p.cycles / 1e6 for p in line], where="post", color="gray")
        if budget_bytes is not None:
            axes.axvline(budget_bytes / 2**20, linestyle=":", color="black")
        axes.set_xlabel(f"{of}, MiB")
        axes.set_ylabel("million cycles" + (" by the planner's time model" if time_by == "model" else ""))


def describe_rules(rules: Rules) -> str:
    """Return rules on one line, with the number of their names."""
    return "; ".join(_format_rule(pattern.text, action) for pattern, action in rules) or "plain"


def _format_rule(pattern: str, action: Any) -> str:
    verb, names = ("offload", action.offload) if action.offload else ("save", action.save)
    parts = ["dropout masks"] if action.policy is not None and action.policy.has_dropout_masks else []
    parts += [f"{len(names)} name{'s' * (len(names) != 1)}"] if names else []
    what = " and ".join(parts) or "nothing"
    group = f", {action.group} in a region" if action.group != 1 else ""
    return f"{pattern}: {verb} {what}{group}" + (" of regions" if action.nested else "")
