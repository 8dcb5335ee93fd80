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
from rich.console import Console
from rich.table import Table

from ..errors import MeasureError
from ..rules.policy import Policy
from ..rules.rule import Remat
from ..rules.ruleset import Rules
from ..transform import apply as application
from . import plotting, staging
from .cache import Cache
from .compile import measure
from .measurement import Measurement, format_bytes, format_count
from .targets import Target, find_target

# What tells the time, the best first: the clock, the compiler's estimate, the number of operations.
_COSTS = (("step_s", "step"), ("estimated_cycles", "cycles"), ("flops", "flops"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ComparisonRow:
    """One candidate.

    Attributes:
        name: As given.
        measurement: What it costs.
        memory_ratio: Temporaries against the first row's; None where one of the two does not say.
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
    """

    rows: tuple[ComparisonRow, ...]
    cost: str

    def __getitem__(self, name: str) -> Measurement:
        """The measurement of a candidate.

        Raises:
            KeyError: If there is no such candidate.
        """
        return {row.name: row.measurement for row in self.rows}[name]

    def to_json(self) -> str:
        """All figures as a JSON text."""
        return json.dumps({"cost": self.cost, "rows": [dataclasses.asdict(row) for row in self.rows]}, indent=2)

    def to_csv(self) -> str:
        """One line per candidate, with a header."""
        text = io.StringIO()
        figures = [
            field.name for field in dataclasses.fields(Measurement) if field.name not in ("notes", "out_of_memory")
        ]
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["name", *figures, "memory_ratio", "time_ratio", "frontier", "fits"])
        for row in self.rows:
            values = [getattr(row.measurement, field) for field in figures]
            writer.writerow([row.name, *values, row.memory_ratio, row.time_ratio, row.frontier, row.measurement.fits])
        return text.getvalue()

    def to_markdown(self) -> str:
        """The table as Markdown."""
        titles, lines = self._cells()
        rule = ["---"] + ["---:"] * (len(titles) - 1)
        return "\n".join(f"| {' | '.join(cells)} |" for cells in (titles, rule, *lines)) + "\n"

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw time against temporaries, with the frontier; PNG or SVG, by the file's ending.

        Raises:
            MeasureError: If matplotlib is not installed.
        """
        points = [(row, *_coordinates(row.measurement, self.cost)) for row in self.rows]
        drawn = [(row, memory, time) for row, memory, time in points if memory is not None and time is not None]
        with plotting.figure(path) as axes:
            frontier = sorted((memory, time) for row, memory, time in drawn if row.frontier)
            axes.step(*zip(*frontier, strict=True), where="post", color="gray", linewidth=1, label="frontier")
            for row, memory, time in drawn:
                axes.plot([memory], [time], "o", color="black" if row.frontier else "tab:orange", markersize=5)
                axes.annotate(row.name, (memory, time), textcoords="offset points", xytext=(5, 4), fontsize=7)
            axes.set_xlabel("temporaries, MiB")
            axes.set_ylabel(
                {"step_s": "step, ms", "estimated_cycles": "estimated cycles, millions"}.get(self.cost, "Gflop")
            )
            axes.set_title(f"target {self.rows[0].measurement.target}", fontsize=9, loc="left")
            axes.margins(x=0.15)
            axes.legend(fontsize=7)

    def __str__(self) -> str:
        console = Console(width=140, no_color=True, highlight=False)
        with console.capture() as captured:
            console.print(self.__rich__())
        return captured.get().rstrip()

    def __rich__(self) -> Table:
        titles, lines = self._cells()
        table = Table(box=None, pad_edge=False, header_style="bold")
        for index, title in enumerate(titles):
            table.add_column(title, justify="right" if index else "left", overflow="fold")
        for line in lines:
            table.add_row(*line)
        return table

    def _cells(self) -> tuple[list[str], list[list[str]]]:
        cost = dict(_COSTS)[self.cost]
        # A peak that leaves the temporaries out, as the CPU compiler's does, would look like a gain that is none.
        peak = "peak" if all(row.measurement.temporaries_in_peak for row in self.rows) else "total"
        titles = ["candidate", "temp", "of first", peak, cost, "of first", "compile s", ""]
        return titles, [[*self._line(row, peak)] for row in self.rows]

    def _line(self, row: ComparisonRow, peak: str) -> Iterator[str]:
        measured = row.measurement
        time = getattr(measured, self.cost)
        yield row.name
        yield format_bytes(measured.temp_bytes)
        yield "-" if row.memory_ratio is None else f"{row.memory_ratio:.3f}"
        yield format_bytes(getattr(measured, f"{peak}_bytes"))
        yield f"{time * 1e3:.3f} ms" if self.cost == "step_s" and time is not None else format_count(time)
        yield "-" if row.time_ratio is None else f"{row.time_ratio:.3f}"
        yield f"{measured.compile_s:.1f}"
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
    model = model_of(fn, args) if any(rules is not None for rules in candidates.values()) else None
    plans = {name: None if rules is None else rules_for(model, rules) for name, rules in candidates.items()}
    for plan in plans.values():  # a rule without effect is to be known before the first long compile
        if plan is not None:
            application.decide(model, plan)
    measured = {}
    for number, (name, plan) in enumerate(plans.items()):
        if progress is not None:
            progress(name, number, len(plans))
        with under(model, plan):
            measured[name] = measure(fn, *args, target=where, differentiate=differentiate, run=run, cache=cache)
    return _comparison(measured)


def model_of(fn: Any, args: tuple[Any, ...]) -> Any:
    """The first model that a call is passed, or closes over.

    Raises:
        MeasureError: If there is none.
    """
    models = staging.stage(fn, args).models
    if not models:
        raise MeasureError(
            what="no nnx model was found in the arguments, or in what the function closes over.",
            why="rules are put onto a model; a graphdef that was split off before knows none.",
            fix="pass the model: fn(model, batch).",
        )
    return models[0]


def rules_for(model: Any, rules: Any) -> Rules:
    """Rules from what a candidate may be.

    Raises:
        MeasureError: If it is a policy, and the model has no sequence of blocks.
    """
    lone = isinstance(rules, Remat | Policy) or (isinstance(rules, str) and not rules.endswith(".toml"))
    if not lone and not (callable(rules) and not isinstance(rules, Rules)):
        return Rules.coerce(rules)
    sequences = application.outermost_sequences(model)
    if not sequences:
        raise MeasureError(
            what=f"the candidate {rules!r} does not say which modules it is for.",
            why="an action alone is put onto every block, and the model has no sequence of blocks.",
            fix=f'{{"encoder": {rules!r}}}, with the path of a module.',
        )
    return Rules(dict.fromkeys(sequences, rules))


@contextmanager
def under(model: Any, rules: Rules | None) -> Iterator[None]:
    """The model under rules for the length of a block; None leaves it as it is."""
    if rules is None:
        yield
        return
    with application.applied(model, rules):
        yield


def _comparison(measured: dict[str, Measurement]) -> Comparison:
    cost = next(
        (field for field, _ in _COSTS if all(getattr(m, field) is not None for m in measured.values() if m.fits)),
        "flops",
    )
    points = {name: _coordinates(m, cost) for name, m in measured.items()}
    first = next(iter(points.values()))
    rows = tuple(
        ComparisonRow(
            name=name,
            measurement=m,
            memory_ratio=_ratio(points[name][0], first[0]),
            time_ratio=_ratio(points[name][1], first[1]),
            frontier=m.fits and not any(_dominates(other, points[name]) for other in points.values()),
        )
        for name, m in measured.items()
    )
    return Comparison(rows=rows, cost=cost)


_SCALES = {"step_s": 1e3, "estimated_cycles": 1e-6, "flops": 1e-9}


def _coordinates(measured: Measurement, cost: str) -> tuple[float | None, float | None]:
    """Memory in MiB and time in the plot's unit."""
    time = getattr(measured, cost)
    memory = measured.temp_bytes / 2**20 if measured.fits or measured.temp_bytes else None
    return memory, None if time is None else time * _SCALES[cost]


def _ratio(value: float | None, first: float | None) -> float | None:
    return None if value is None or not first else value / first


def _dominates(other: tuple[float | None, float | None], point: tuple[float | None, float | None]) -> bool:
    if None in other or None in point or other == point:
        return False
    return all(a <= b for a, b in zip(other, point, strict=True) if a is not None and b is not None)
