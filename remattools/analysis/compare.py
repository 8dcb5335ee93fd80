# SPDX-License-Identifier: Apache-2.0
"""Several ways to rematerialise one call, side by side.

Sits on `compile` and `transform.apply`. Each candidate is put onto the model for the
length of one measurement and taken off again.
"""

import csv
import dataclasses
import io
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import jax
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from ..compiler.cache import Cache
from ..compiler.report import Measurement, format_bytes, format_count, strip_padding
from ..compiler.targets import Target, find_target
from ..errors import MeasureError
from ..rules.paths import format_path
from ..rules.policy import Policy
from ..rules.rule import Remat
from ..rules.ruleset import Rules
from ..tracing import pure_call
from ..tracing.origins import has_gradient, trace_with_paths
from ..transform import apply as application
from ..transform.modules import find_modules
from . import plot
from .measure import measure

# What tells the time, the best first: the clock, the compiler's estimate, the number of operations.
_COST_FIELDS = (("step_s", "step"), ("estimated_cycles", "cycles"), ("flops", "flops"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ComparisonRow:
    """One candidate.

    Attributes:
        name: As given.
        measurement: What it costs.
        memory_ratio: Memory against the first row's; None where one of the two does not say.
        time_ratio: Step time, cycles or flops against the first row's.
        frontier: Whether no other candidate is at least as good in both.
    """

    name: str
    measurement: Measurement
    memory_ratio: float | None
    time_ratio: float | None
    frontier: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """Candidates in the order given; `str()` is a table.

    Attributes:
        rows: One per candidate; ratios refer to the first.
        cost: What the time is told by: "step_s", "estimated_cycles" or "flops".
        memory: What the memory is told by: "temp_bytes", or "peak_bytes" where temporaries of a row lie in the TPU's
            own memory, which the compiler leaves out of `temp_bytes`.
        notes: What to know before relying on the figures.
    """

    rows: tuple[ComparisonRow, ...]
    cost: str
    memory: str = "temp_bytes"
    notes: tuple[str, ...] = ()

    def __getitem__(self, name: str) -> Measurement:
        """The measurement of a candidate.

        Raises:
            KeyError: If there is no such candidate.
        """
        return {row.name: row.measurement for row in self.rows}[name]

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return dataclasses.asdict(self)

    def to_json(self) -> str:
        """All figures as a JSON text."""
        return json.dumps(self.as_dict(), indent=2)

    def to_csv(self) -> str:
        """One line per candidate, with a header."""
        text = io.StringIO()
        figures = [
            field.name
            for field in dataclasses.fields(Measurement)
            if field.name not in ("notes", "out_of_memory", "refusal")
        ]
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["name", *figures, "memory_ratio", "time_ratio", "frontier", "fits"])
        for row in self.rows:
            values = [getattr(row.measurement, field) for field in figures]
            writer.writerow([row.name, *values, row.memory_ratio, row.time_ratio, row.frontier, row.measurement.fits])
        return text.getvalue()

    def to_markdown(self) -> str:
        """The table as Markdown."""
        titles, lines = self._format_cells()
        rule = ["---"] + ["---:"] * (len(titles) - 1)
        return "\n".join(f"| {' | '.join(cells)} |" for cells in (titles, rule, *lines)) + "\n"

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw time against temporaries, with the frontier; PNG or SVG, by the file's ending.

        Raises:
            MeasureError: If matplotlib is not installed.
        """
        points = [(row, *_get_coordinates(row.measurement, self.memory, self.cost)) for row in self.rows]
        drawn = [(row, memory, time) for row, memory, time in points if memory is not None and time is not None]
        with plot.open_figure(path) as axes:
            frontier = sorted((memory, time) for row, memory, time in drawn if row.frontier)
            steps = tuple(zip(*frontier, strict=True)) or ((), ())  # nothing may fit
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

    def __str__(self) -> str:
        console = Console(width=140, no_color=True, highlight=False)
        with console.capture() as captured:
            console.print(self._make_table())
        return "\n".join([*strip_padding(captured.get()), *self._format_notes()])

    def __rich__(self) -> Group:
        return Group(self._make_table(), *map(Text, self._format_notes()))

    def _format_notes(self) -> list[str]:
        return [f"note: {note}" for note in self.notes]

    def _make_table(self) -> Table:
        titles, lines = self._format_cells()
        table = Table(box=None, pad_edge=False, header_style="bold")
        for index, title in enumerate(titles):
            table.add_column(title, justify="right" if index else "left", overflow="fold")
        for line in lines:
            table.add_row(*map(Text, line))  # as it is: a name in brackets is no markup
        return table

    def _format_cells(self) -> tuple[list[str], list[list[str]]]:
        cost = dict(_COST_FIELDS)[self.cost]
        # A peak that leaves the temporaries out, as the CPU compiler's does, would look like a gain that is none.
        beside = "peak" if all(row.measurement.temporaries_in_peak for row in self.rows) else "total"
        memory = self.memory.removesuffix("_bytes")
        beside = beside if memory == "temp" else "temp"
        titles = ["candidate", memory, "of first", beside, cost, "of first", "compile s", ""]
        return titles, [[*self._format_row(row, memory, beside)] for row in self.rows]

    def _format_row(self, row: ComparisonRow, memory: str, second_memory: str) -> Iterator[str]:
        measured = row.measurement
        time = getattr(measured, self.cost)
        known = measured.refusal is None
        yield row.name
        yield format_bytes(getattr(measured, f"{memory}_bytes") if known else None)
        yield "-" if row.memory_ratio is None else f"{row.memory_ratio:.3f}"
        yield format_bytes(getattr(measured, f"{second_memory}_bytes") if known else None)
        yield f"{time * 1e3:.3f} ms" if self.cost == "step_s" and time is not None else format_count(time)
        yield "-" if row.time_ratio is None else f"{row.time_ratio:.3f}"
        yield f"{measured.compile_s:.1f}"
        if not known:
            yield "does not compile"
        else:
            yield "does not fit" if not measured.fits else "frontier" if row.frontier else ""


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
        fn: As in `measure`.
        *args: As in `measure`; one of them, or what `fn` closes over, is the model.
        candidates: Names with what to apply to the model: rules in any form, the path of a rule file, a policy or
            `Remat` (on every block: the members of the model's outermost sequences), or None for the model as it is.
        target: As in `measure`.
        differentiate: As in `measure`.
        run: As in `measure`.
        cache: As in `measure`.
        progress: Called before each measurement with its name, its number and how many there are.

    Returns:
        A row per candidate.

    Raises:
        MeasureError: If there are no candidates, or no model to put them on.
        UnmatchedRuleError: If a rule matches nothing.
    """
    if not candidates or not isinstance(candidates, Mapping):
        raise MeasureError(
            what="compare was given no candidates." if not candidates else f"candidates={candidates!r} have no names.",
            why="there is nothing to set side by side." if not candidates else "each row of the table has a name.",
            fix='candidates={"plain": None, "full": "nothing_saveable"}.',
        )
    where = find_target(target)
    model = find_model(fn, args) if any(rules is not None for rules in candidates.values()) else None
    candidates = {str(name): rules for name, rules in candidates.items()}
    plans = {name: None if rules is None else make_rules(model, rules) for name, rules in candidates.items()}
    for plan in plans.values():  # a rule without effect is to be known before the first long compile
        if plan is not None:
            application.decide(model, plan)
    measured: dict[str, Measurement] = {}
    refused: dict[str, Exception] = {}
    for number, (name, plan) in enumerate(plans.items()):
        if progress is not None:
            progress(name, number, len(plans))
        with use_rules(model, plan):
            try:
                measured[name] = measure(fn, *args, target=where, differentiate=differentiate, run=run, cache=cache)
            except jax.errors.JaxRuntimeError as error:  # the others are not to be lost for it
                refused[name] = error
                measured[name] = _make_refusal(str(error), where)
    if len(refused) == len(plans):
        raise next(iter(refused.values()))
    notes = (
        *(f"{name} does not compile: {str(error).splitlines()[0]}" for name, error in refused.items()),
        *_collect_notes(fn, args, model, candidates, plans, differentiate=differentiate),
    )
    return _build_comparison(measured, notes)


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
    fn: Any, args: Any, model: Any, candidates: Mapping[str, Any], plans: Mapping[str, Any], *, differentiate: bool
) -> Iterator[str]:
    """What the table does not show: rules that had nothing to change, and what an action alone was put on."""
    if model is None:
        return
    if not differentiate and not _has_gradient(fn, args):
        yield (
            "the function takes no gradient, and rules change nothing but gradients: for a loss say "
            "differentiate=True (on the command line: leave out --as-is)."
        )
    lone = [name for name, rules in candidates.items() if _is_bare_action(rules)]
    if lone:
        patterns = ", ".join(pattern.text for pattern, _ in plans[lone[0]])
        yield f"{', '.join(lone)} {'is' if len(lone) == 1 else 'are'} put on {patterns}."


def find_model(fn: Any, args: tuple[Any, ...]) -> Any:
    """The first model that a call is passed, or closes over.

    Raises:
        MeasureError: If there is none.
    """
    models = pure_call.stage(fn, args).models
    if not models:
        raise MeasureError(
            what="no nnx model was found in the arguments, or in what the function closes over.",
            why="rules are put onto a model; a graphdef that was split off before knows none.",
            fix="pass the model: fn(model, batch).",
        )
    return models[0]


def make_rules(model: Any, rules: Any) -> Rules:
    """Rules from what a candidate may be.

    Raises:
        MeasureError: If it is a policy, and the model has no sequence of blocks.
    """
    if not _is_bare_action(rules):
        return Rules.coerce(rules)
    sequences = application.find_outermost_sequences(model)
    if not sequences:
        raise MeasureError(
            what=f"the candidate {rules!r} does not say which modules it is for.",
            why="an action alone is put onto every block, and the model has no sequence of blocks.",
            fix=f'{{"{_find_first_child(model)}": {rules!r}}}, with the path of a module or a pattern.',
        )
    return Rules(dict.fromkeys(sequences, rules))


def _has_gradient(fn: Any, args: Any) -> bool:
    return has_gradient(
        trace_with_paths(pure_call.stage(pure_call.unwrap_jit(fn), args), lambda evaluated: evaluated[1])
    )


def _is_bare_action(rules: Any) -> bool:
    """An action that does not say what it is for."""
    if isinstance(rules, str):
        return not rules.endswith(".toml")
    return isinstance(rules, Remat | Policy) or (callable(rules) and not isinstance(rules, Rules))


def _find_first_child(model: Any) -> str:
    paths = [format_path(entry.path) for entry in find_modules(model) if entry.path]
    return paths[0] if paths else "."


@contextmanager
def use_rules(model: Any, rules: Rules | None) -> Iterator[None]:
    """The model under rules for the length of a block; None leaves it as it is."""
    if rules is None:
        yield
        return
    with application.applied(model, rules):
        yield


def _build_comparison(measurements: dict[str, Measurement], notes: tuple[str, ...]) -> Comparison:
    fitting = [m for m in measurements.values() if m.fits]
    told = [field for field, _ in _COST_FIELDS if fitting and all(getattr(m, field) is not None for m in fitting)]
    cost = told[0] if told else "flops"
    memory = "peak_bytes" if any(m.temporaries_on_chip for m in fitting) else "temp_bytes"
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


_SCALES = {"step_s": 1e3, "estimated_cycles": 1e-6, "flops": 1e-9}


def _get_coordinates(measurement: Measurement, memory: str, cost: str) -> tuple[float | None, float | None]:
    """Memory in MiB and time in the plot's unit."""
    time, count = getattr(measurement, cost), getattr(measurement, memory)
    return count / 2**20 if measurement.fits or count else None, None if time is None else time * _SCALES[cost]


def _compute_ratio(value: float | None, first: float | None) -> float | None:
    return None if value is None or not first else value / first


def _is_dominating(other: tuple[float | None, float | None], point: tuple[float | None, float | None]) -> bool:
    if None in other or None in point or other == point:
        return False
    return all(a <= b for a, b in zip(other, point, strict=True) if a is not None and b is not None)
