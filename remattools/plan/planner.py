# SPDX-License-Identifier: Apache-2.0
"""`plan`: a budget in, rules out, every one of them compiled.

Sits on everything else in `plan`. The planner's model proposes, the compiler disposes:
each proposal is compiled, corrects the predictions of all others, and only what the
compiler measured is ever returned.
"""

import os
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from ..errors import BudgetError, MeasureError
from ..measure.cache import Cache
from ..measure.compile import measure
from ..measure.measurement import Measurement, format_bytes, format_count
from ..measure.targets import Target, find_target
from ..measure.timeline import timeline
from ..rules.ruleset import Rules
from ..transform import apply as application
from .budget import Of, budget_bytes, bytes_of
from .cost import rates_of
from .outline import outline
from .result import Plan, Point, Prediction
from .search import Space
from .writing import rules_of

_OFF = Rules(((".", False), ("**", False)))
# Below this gain a further compile is not worth its time.
_GAIN = 0.002
Progress = Callable[[str], None]


def plan(
    loss_fn: Callable[..., Any],
    model: Any,
    *batch: Any,
    budget: int | float | str | None = None,
    of: Of = "peak",
    max_cycles: float | None = None,
    differentiate: bool = True,
    target: str | Target | jax.Device | None = None,
    max_compiles: int = 8,
    time_limit_s: float | None = None,
    cache: Cache | str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> Plan:
    """Find rules that keep a memory budget with the least recomputation.

    Args:
        loss_fn: A loss of the model and the batch.
        model: An nnx model, real or abstract; rules on it are left out of account.
        *batch: The loss's other arguments, real or abstract.
        budget: Bytes, a text such as `"12GiB"`, a fraction of what the plain model takes (`0.5`), or `"fit"` (the
            device's memory less a margin).
        of: What the budget is about: "peak", all that a gradient step takes, or "temp", the compiler's temporaries.
        max_cycles: Ask the other way round: the least memory within this time (and within the budget, if one is given).
        differentiate: Only True: the planner takes the gradient itself, so as to see both passes.
        target: As in `measure`.
        max_compiles: The most programs to compile; those found in the cache count too.
        time_limit_s: After this time no further compile begins.
        cache: As in `measure`.
        progress: Called with a line of text before each compile.

    Returns:
        The fastest of all compiled points that keep the budget. Ctrl-C returns the best one so far.

    Raises:
        BudgetError: If the budget cannot be read or reached; with the least that was reached and what holds it there.
        MeasureError: If the model has no blocks, or there is nothing to differentiate.
    """
    _check(budget, of, max_cycles, differentiate, max_compiles)
    where = find_target(target)
    start = time.monotonic()
    shape = outline(loss_fn, model, batch, rates_of(where.name))
    search = _Search(
        space=Space(shape),
        measured_by=lambda rules: _measured(loss_fn, model, batch, rules, where, cache),
        of=of,
        plain_cycles=shape.plain_cycles(),
        progress=progress or (lambda _: None),
    )

    def may_go_on() -> bool:
        late = time_limit_s is not None and time.monotonic() - start > time_limit_s
        return len(search.points) < max_compiles and not late

    limit: int | None = None
    try:
        search.compile(search.space.assignments.index(search.space.plain))
        plain = next(iter(search.points.values()))
        if budget is not None:
            limit = budget_bytes(budget, target=where, plain_bytes=plain.bytes)
        while may_go_on():
            number = search.propose(limit, max_cycles)
            if number is None:
                break
            search.compile(number)
    except KeyboardInterrupt:
        if search.best(limit, max_cycles) is None:
            raise
    best = search.best(limit, max_cycles)
    if best is None:
        raise _unreachable(search, limit, max_cycles, loss_fn, model, batch)
    return Plan(
        rules=best.rules,
        predicted=best.predicted,
        measured=best.measured,
        points=tuple(search.points.values()),
        budget_bytes=limit,
        of=of,
        time_by="model" if best.measured.estimated_cycles is None else "estimated_cycles",
        subject=_subject(model, batch),
    )


class _Search:
    """Compiled points, and what they say of the others."""

    def __init__(
        self,
        *,
        space: Space,
        measured_by: Callable[[Rules], Measurement],
        of: Of,
        plain_cycles: float,
        progress: Progress,
    ) -> None:
        self.space, self.measured_by, self.of = space, measured_by, of
        self.plain_cycles, self.progress = plain_cycles, progress
        self.points: dict[int, Point] = {}
        self.by_rules: dict[Rules, Measurement] = {}

    def compile(self, number: int) -> None:
        """Measure an assignment."""
        rules = rules_of(self.space, self.space.assignments[number])
        sizes, cycles = self.predictions()
        predicted = Prediction(bytes=int(sizes[number]), cycles=float(cycles[number]))
        self.progress(
            f"compile {len(self.points) + 1}: expecting {format_bytes(predicted.bytes)}, "
            f"{format_count(predicted.cycles)} cycles"
        )
        if rules not in self.by_rules:
            self.by_rules[rules] = self.measured_by(rules)
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

    def predictions(self) -> tuple[np.ndarray, np.ndarray]:
        """Bytes and cycles of all assignments, by the model and all that was measured."""
        fitting = {number: point for number, point in self.points.items() if point.measured.fits}
        cycles = self.plain_cycles + self.space.cycles
        if not fitting:
            return self.space.bytes, cycles
        sizes = self.space.corrected("bytes", {n: float(p.bytes) for n, p in fitting.items()})
        if all(point.measured.estimated_cycles is not None for point in fitting.values()):
            cycles = self.space.corrected("cycles", {n: p.cycles for n, p in fitting.items()})
        return sizes, cycles

    def best(self, limit: int | None, max_cycles: float | None) -> Point | None:
        """The best compiled point that keeps the limits."""
        kept = [
            point
            for point in self.points.values()
            if point.measured.fits
            and (limit is None or point.bytes <= limit)
            and (max_cycles is None or point.cycles <= max_cycles)
        ]
        return min(kept, key=lambda point: _order(point.bytes, point.cycles, max_cycles), default=None)

    def propose(self, limit: int | None, max_cycles: float | None) -> int | None:
        """The assignment to compile next, or None if none promises more."""
        sizes, cycles = self.predictions()
        open_ = np.array([number not in self.points for number in range(len(sizes))])
        best = self.best(limit, max_cycles)
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


def _order(size: float, cycles: float, max_cycles: float | None) -> tuple[float, float]:
    return (cycles, size) if max_cycles is None else (size, cycles)


def _measured(
    fn: Callable[..., Any], model: Any, batch: tuple[Any, ...], rules: Rules, target: Target, cache: Any
) -> Measurement:
    with application.applied(model, _OFF), application.applied(model, rules):
        return measure(fn, model, *batch, target=target, differentiate=True, cache=cache)


def _check(budget: Any, of: str, max_cycles: float | None, differentiate: bool, max_compiles: int) -> None:
    if budget is None and max_cycles is None:
        raise BudgetError(
            what="neither a budget nor max_cycles was given.",
            why="a plan is the best there is within a limit.",
            fix='budget="12GiB", or budget=0.5 for half of what the plain model takes.',
        )
    if of not in ("peak", "temp"):
        raise BudgetError(
            what=f"of={of!r} is no figure of a program.",
            why='"peak" counts parameters, gradients and temporaries, "temp" the temporaries alone.',
            fix='of="peak" or of="temp".',
        )
    if type(max_compiles) is not int or max_compiles < 2:
        raise BudgetError(
            what=f"max_compiles={max_compiles!r} compiles too little.",
            why="the plain model is compiled first, and at least one plan has to be verified.",
            fix="max_compiles=8.",
        )
    if not differentiate:
        raise MeasureError(
            what="differentiate=False: the planner cannot look into a step that takes its gradient itself.",
            why="it differentiates each block by itself to know what the backward pass needs.",
            fix="pass the loss; optimizer state can be taken off the budget: it does not change with the rules.",
        )


def _unreachable(
    search: _Search, limit: int | None, max_cycles: float | None, fn: Any, model: Any, batch: tuple[Any, ...]
) -> BudgetError:
    if max_cycles is not None:
        fastest = min(search.points.values(), key=lambda point: point.cycles)
        return BudgetError(
            what=f"no compiled rules stay within {max_cycles:,.0f} cycles"
            + ("." if limit is None else f" and {format_bytes(limit)}."),
            why=f"the fastest takes {fastest.cycles:,.0f} cycles and {format_bytes(fastest.bytes)}.",
            fix=f"max_cycles={int(fastest.cycles) + 1}, or a larger budget.",
        )
    least = min(search.points.values(), key=lambda point: point.bytes)
    with application.applied(model, _OFF), application.applied(model, least.rules):
        alive = timeline(fn, model, *batch, differentiate=True).largest[:3]
    holding = "; ".join(f"{a.path} {a.name} {a.shape}: {format_bytes(a.bytes)}" for a in alive)
    return BudgetError(
        what=f"no compiled rules stay within {format_bytes(limit)} of {search.of}; the least is "
        f"{least.bytes} bytes ({format_bytes(least.bytes)}) with {least.measured.argument_bytes} of arguments.",
        why=f"at the fullest moment these are alive: {holding}.",
        fix=f"budget={least.bytes}, a smaller batch, or a loss that makes its largest values in pieces.",
    )


def _subject(model: Any, batch: tuple[Any, ...]) -> str:
    shapes = [f"{leaf.dtype}{list(leaf.shape)}" for leaf in jax.tree.leaves(batch) if hasattr(leaf, "shape")]
    return f"{type(model).__name__}, batch {', '.join(shapes) or 'none'}"
