# SPDX-License-Identifier: Apache-2.0
"""`compare`: measure one call under several rules, side by side.

Sits on `measure` and `ruled_call`. Each candidate's rules are applied to the model for one
measurement and reverted afterwards.
"""

import csv
import dataclasses
import io
import json
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import jax
from rich.console import Group
from rich.table import Table
from rich.text import Text

from ..compiler.cache import Cache
from ..compiler.report import Measurement, format_count
from ..compiler.targets import Target, find_target
from ..errors import MeasureError
from ..rules.ruleset import Rules
from ..text import format_bytes, make_table, render_text
from ..tracing import pure_call
from ..tracing.origins import has_gradient, trace_with_paths
from ..transform import apply as application
from . import plot, random_cost
from .measure import measure
from .ruled_call import find_model, is_bare_action, make_rules, use_rules

CostField = Literal["step_s", "estimated_cycles", "flops"]
MemoryField = Literal["temp_bytes", "peak_bytes"]
# Measures of time, best first, with their column titles: the clock, the compiler's estimate, the operation count.
_COST_TITLES: dict[CostField, str] = {"step_s": "step", "estimated_cycles": "cycles", "flops": "flops"}
# Factors to the units of plots: milliseconds, millions of cycles, Gflop.
_COST_SCALES: dict[CostField, float] = {"step_s": 1e3, "estimated_cycles": 1e-6, "flops": 1e-9}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ComparisonRow:
    """One candidate in a `Comparison`.

    Attributes:
        name: The candidate's name.
        measurement: Its measurement.
        memory_ratio: Memory relative to the first row; None if either is unknown.
        time_ratio: Step time, cycles or flops relative to the first row; None if either is unknown.
        frontier: Whether it is on the Pareto frontier: no other candidate is at least as good in both.
    """

    name: str
    measurement: Measurement
    memory_ratio: float | None
    time_ratio: float | None
    frontier: bool


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class Comparison:
    """Measurements of candidates in the order given; `str()` is a table, `comparison["name"]` a measurement.

    Attributes:
        rows: One row per candidate; ratios are relative to the first.
        cost: The measure of time: "step_s", "estimated_cycles" or "flops".
        memory: The measure of memory: "temp_bytes", or "peak_bytes" if a candidate has temporaries in a TPU's on-chip
            memory, which `temp_bytes` does not count.
        notes: Caveats to read before relying on the numbers.

    Example:
        >>> import jax, jax.numpy as jnp, remattools as rt
        >>> from flax import nnx
        >>> model = nnx.eval_shape(lambda: nnx.Linear(64, 64, rngs=nnx.Rngs(0)))
        >>> x = jax.ShapeDtypeStruct((8, 64), jnp.float32)
        >>> loss = lambda model, x: jnp.sum(model(x) ** 2)
        >>> candidates = {"plain": None, "remat": {".": "nothing_saveable"}}
        >>> comparison = rt.compare(loss, model, x, candidates=candidates, differentiate=True, target="cpu")
        >>> comparison["plain"] == comparison.rows[0].measurement
        True
        >>> [row.name for row in comparison.rows]
        ['plain', 'remat']
    """

    rows: tuple[ComparisonRow, ...]
    cost: CostField
    memory: MemoryField = "temp_bytes"
    notes: tuple[str, ...] = ()

    def __getitem__(self, name: str) -> Measurement:
        """Return the measurement of a candidate.

        Raises:
            KeyError: If no candidate has that name.
        """
        return {row.name: row.measurement for row in self.rows}[name]

    def as_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return dataclasses.asdict(self)

    def to_json(self) -> str:
        """Return all measurements as a JSON string."""
        return json.dumps(self.as_dict(), indent=2)

    def to_csv(self) -> str:
        """Return CSV with a header and one line per candidate."""
        buffer = io.StringIO()
        columns = [
            field.name
            for field in dataclasses.fields(Measurement)
            if field.name not in ("notes", "out_of_memory", "refusal")
        ]
        writer = csv.writer(buffer, lineterminator="\n")
        writer.writerow(["name", *columns, "memory_ratio", "time_ratio", "frontier", "fits"])
        for row in self.rows:
            values = [getattr(row.measurement, field) for field in columns]
            writer.writerow([row.name, *values, row.memory_ratio, row.time_ratio, row.frontier, row.measurement.fits])
        return buffer.getvalue()

    def to_markdown(self) -> str:
        """Return the table as Markdown."""
        titles, lines = self._format_cells()
        separators = ["---"] + ["---:"] * (len(titles) - 1)
        return "\n".join(f"| {' | '.join(cells)} |" for cells in (titles, separators, *lines)) + "\n"

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw time against memory, with the Pareto frontier.

        Args:
            path: File to write; its suffix, .png, .svg or .pdf, sets the format.

        Raises:
            MeasureError: If matplotlib is not installed, or the suffix is another.
        """
        points = [(row, *_get_coordinates(row.measurement, self.memory, self.cost)) for row in self.rows]
        drawn = [(row, memory, time) for row, memory, time in points if memory is not None and time is not None]
        with plot.open_figure(path) as axes:
            frontier = sorted((memory, time) for row, memory, time in drawn if row.frontier)
            steps = tuple(zip(*frontier, strict=True)) or ((), ())  # empty if every candidate runs out of memory
            axes.step(*steps, where="post", color="gray", linewidth=1, label="frontier")
            for row, memory, time in drawn:
                axes.plot([memory], [time], "o", color="black" if row.frontier else "tab:orange", markersize=5)
                axes.annotate(row.name, (memory, time), textcoords="offset points", xytext=(5, 4), fontsize=7)
            axes.set_xlabel("temporaries, MiB" if self.memory == "temp_bytes" else "peak, MiB")
            axes.set_ylabel(
                {"step_s": "step, ms", "estimated_cycles": "estimated cycles, millions"}.get(self.cost, "Gflop")
            )
            axes.set_title(f"target {self.rows[0].measurement.target}", fontsize=9, loc="left")
            axes.margins(x=0.15)
            axes.legend(fontsize=7)

    def __repr__(self) -> str:
        return f"Comparison({', '.join(row.name for row in self.rows)}; cost={self.cost!r}, memory={self.memory!r})"

    def __str__(self) -> str:
        return "\n".join([render_text(self._make_table()), *self._format_notes()])

    def __rich__(self) -> Group:
        return Group(self._make_table(), *map(Text, self._format_notes()))

    def _format_notes(self) -> list[str]:
        return [f"note: {note}" for note in self.notes]

    def _make_table(self) -> Table:
        titles, lines = self._format_cells()
        return make_table(titles, lines, numeric=titles[1:])

    def _format_cells(self) -> tuple[list[str], list[list[str]]]:
        memory = self.memory.removesuffix("_bytes")
        second_memory = "temp"
        if memory == "temp":
            # A peak without the temporaries, as the CPU compiler's, would hide what a candidate costs.
            second_memory = "peak" if all(row.measurement.temporaries_in_peak for row in self.rows) else "total"
        titles = ["candidate", memory, "of first", second_memory, _COST_TITLES[self.cost], "of first", "compile s", ""]
        return titles, [[*self._format_row(row, memory, second_memory)] for row in self.rows]

    def _format_row(self, row: ComparisonRow, memory: str, second_memory: str) -> Iterator[str]:
        measurement = row.measurement
        time = getattr(measurement, self.cost)
        is_compiled = measurement.refusal is None
        yield row.name
        yield format_bytes(getattr(measurement, f"{memory}_bytes") if is_compiled else None)
        yield "-" if row.memory_ratio is None else f"{row.memory_ratio:.3f}"
        yield format_bytes(getattr(measurement, f"{second_memory}_bytes") if is_compiled else None)
        yield f"{time * 1e3:.3f} ms" if self.cost == "step_s" and time is not None else format_count(time)
        yield "-" if row.time_ratio is None else f"{row.time_ratio:.3f}"
        yield f"{measurement.compile_s:.1f}"
        if not is_compiled:
            yield "does not compile"
        else:
            yield "out of memory" if not measurement.fits else "frontier" if row.frontier else ""


def compare(
    fn: Callable[..., Any],
    *args: Any,
    candidates: Mapping[str, Any],
    target: str | Target | jax.Device | None = None,
    differentiate: bool = False,
    run: bool = False,
    cache: Cache | str | os.PathLike[str] | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Comparison:
    """Measure one call under several rules.

    Args:
        fn: What to measure: usually a train step, or a loss with `differentiate=True`.
        *args: Its arguments, real or abstract. One of them, or what `fn` closes over, is the model.
        candidates: Rules by name: rules in any form, the path of a rule file, a policy or a `Remat` for every block
            (the members of the model's outermost sequences), or None for the model as it is.
        target: Target name, topology or device to compile for; None as in `measure`.
        differentiate: Measure the gradient of the loss that `fn` returns.
        run: Also run each candidate and time a step.
        cache: Directory or `Cache` of earlier measurements; None as in `measure`.
        progress: Called before each measurement with the candidate's name, its index and the number of candidates.

    Returns:
        One row per candidate.

    Raises:
        MeasureError: If `candidates` is empty, or the call has no model to apply them to.
        UnmatchedRuleError: If a rule matches no module.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import remattools as rt
        >>> from flax import nnx
        >>> model = nnx.eval_shape(lambda: nnx.Linear(64, 64, rngs=nnx.Rngs(0)))
        >>> x = jax.ShapeDtypeStruct((8, 64), jnp.float32)
        >>> candidates = {"plain": None, "remat": {".": "nothing_saveable"}}
        >>> result = rt.compare(
        ...     lambda model, x: jnp.sum(jnp.sin(model(x))), model, x, candidates=candidates,
        ...     differentiate=True, target="cpu",
        ... )
        >>> [row.name for row in result.rows]
        ['plain', 'remat']
    """
    if not candidates or not isinstance(candidates, Mapping):
        raise MeasureError(
            what="compare was given no candidates." if not candidates else f"candidates={candidates!r} have no names.",
            why="the table would be empty." if not candidates else "each row of the table needs a name.",
            fix='candidates={"plain": None, "full": "nothing_saveable"}.',
        )
    where = find_target(target)
    model = find_model(fn, args) if any(rules is not None for rules in candidates.values()) else None
    candidates = {str(name): rules for name, rules in candidates.items()}
    rules_by_name = {
        name: None if model is None or rules is None else make_rules(model, rules) for name, rules in candidates.items()
    }
    for rules in rules_by_name.values():  # a rule that matches nothing fails before the first long compile
        if rules is not None:
            application.decide(model, rules)
    measurements: dict[str, Measurement] = {}
    refusals: dict[str, Exception] = {}
    random_notes: list[str] = []
    for number, (name, rules) in enumerate(rules_by_name.items()):
        if progress is not None:
            progress(name, number, len(rules_by_name))
        with use_rules(model, rules, fn) as ruled_fn:
            try:
                measurements[name] = measure(
                    ruled_fn, *args, target=where, differentiate=differentiate, run=run, cache=cache
                )
            except jax.errors.JaxRuntimeError as error:  # one refusal must not lose the other measurements
                refusals[name] = error
                measurements[name] = _make_refusal(str(error), where)
            random_notes += _note_random_cost(name, ruled_fn, args, measurements[name], differentiate=differentiate)
    if random_notes:
        random_notes.append(random_cost.describe_cures())
    if len(refusals) == len(rules_by_name):
        raise next(iter(refusals.values()))
    notes = (
        *(f"{name} does not compile: {str(error).splitlines()[0]}" for name, error in refusals.items()),
        *_collect_notes(fn, args, candidates, rules_by_name, differentiate=differentiate),
        *random_notes,
    )
    return _build_comparison(measurements, notes)


def _make_refusal(message: str, target: Target) -> Measurement:
    return Measurement(
        target=target.name,
        argument_bytes=0,
        output_bytes=0,
        alias_bytes=0,
        temp_bytes=0,
        peak_bytes=0,
        refusal=message,
    )


def _collect_notes(
    fn: Any,
    args: Any,
    candidates: Mapping[str, Any],
    rules_by_name: Mapping[str, Rules | None],
    *,
    differentiate: bool,
) -> Iterator[str]:
    """Yield what the table does not show: rules that could change nothing, and where an action alone was applied."""
    if all(rules is None for rules in candidates.values()):
        return
    if not differentiate and not _has_gradient(fn, args):
        yield (
            "the function takes no gradient, and rules change only gradients: for a loss, pass differentiate=True "
            "(on the command line: leave out --as-is)."
        )
    bare = [name for name, rules in candidates.items() if is_bare_action(rules)]
    if bare:
        patterns = ", ".join(pattern.text for pattern, _ in rules_by_name[bare[0]] or ())
        yield f"{', '.join(bare)} {'applies' if len(bare) == 1 else 'apply'} to {patterns}."


def _note_random_cost(
    name: str, fn: Any, args: tuple[Any, ...], measurement: Measurement, *, differentiate: bool
) -> Iterator[str]:
    """Yield a note on a candidate whose regions draw random bits again, if that costs memory."""
    if random_cost.may_be_costly(measurement):
        redrawn = random_cost.find_redrawn_in_call(fn, args, differentiate=differentiate)
        message = random_cost.describe_cost(measurement, redrawn)
        if message:
            yield f"{name}: {message}"


def _has_gradient(fn: Any, args: Any) -> bool:
    return has_gradient(
        trace_with_paths(pure_call.stage(pure_call.unwrap_jit(fn), args), lambda evaluated: evaluated[1])
    )


def _build_comparison(measurements: dict[str, Measurement], notes: tuple[str, ...]) -> Comparison:
    fitting = [m for m in measurements.values() if m.fits]
    costs = [field for field in _COST_TITLES if fitting and all(getattr(m, field) is not None for m in fitting)]
    cost = costs[0] if costs else "flops"
    memory: MemoryField = "peak_bytes" if any(m.temporaries_on_chip for m in fitting) else "temp_bytes"
    points = {name: _get_coordinates(m, memory, cost) for name, m in measurements.items()}
    first = next(iter(points.values()))
    rows = tuple(
        ComparisonRow(
            name=name,
            measurement=m,
            memory_ratio=_compute_ratio(points[name][0], first[0]),
            time_ratio=_compute_ratio(points[name][1], first[1]),
            frontier=m.fits and not any(_is_dominating(other, points[name]) for other in points.values()),
        )
        for name, m in measurements.items()
    )
    return Comparison(rows=rows, cost=cost, memory=memory, notes=notes)


def _get_coordinates(
    measurement: Measurement, memory: MemoryField, cost: CostField
) -> tuple[float | None, float | None]:
    """Return memory in MiB, and time in the plot's unit; None where unknown."""
    time, count = getattr(measurement, cost), getattr(measurement, memory)
    return count / 2**20 if measurement.fits or count else None, None if time is None else time * _COST_SCALES[cost]


def _compute_ratio(value: float | None, first: float | None) -> float | None:
    return None if value is None or not first else value / first


def _is_dominating(other: tuple[float | None, float | None], point: tuple[float | None, float | None]) -> bool:
    if None in other or None in point or other == point:
        return False
    return all(a <= b for a, b in zip(other, point, strict=True) if a is not None and b is not None)
