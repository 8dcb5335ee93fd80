# SPDX-License-Identifier: Apache-2.0
"""`plan`: a budget in, rules out, every one of them compiled; `frontier`: all budgets at once.

Sits on everything else in `plan`. The search ends when nothing promises more, when the
compiles or the time are spent, or at Ctrl-C; what was compiled until then is the result.
"""

import os
import time
from collections.abc import Callable
from typing import Any

import jax

from ..analysis.measure import measure
from ..analysis.timeline import timeline
from ..compiler.cache import Cache, find_cache
from ..compiler.report import Measurement
from ..compiler.targets import Target, find_target
from ..errors import BudgetError
from ..rules.ruleset import Rules
from ..text import format_bytes
from ..transform import apply as application
from .budget import BudgetKind, compute_budget_bytes, require_positive
from .frontier import Frontier, check_limits
from .model.outline import build_outline
from .model.time import get_rates
from .result import Plan, Point
from .search.exploration import Exploration
from .search.history import RuleHistory
from .search.space import Space

_REGIONS_OFF = Rules(((".", False), ("**", False)))
# From this on the head of a rule file says how many arrays an argument has, not which.
_MAX_LISTED_ARRAYS = 8
Progress = Callable[[str], None]
_ProposeNext = Callable[[Exploration], int | None]


def plan(
    loss_fn: Callable[..., Any],
    model: Any,
    *batch: Any,
    budget: int | float | str | None = None,
    of: BudgetKind = "peak",
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
        loss_fn: A loss of the model and the batch; or with `differentiate=False` a step of the model, the optimizer and
            the batch, jitted or not.
        model: An nnx model, real or abstract; rules on it are left out of account.
        *batch: The function's other arguments, real or abstract.
        budget: Bytes, a text such as `"12GiB"`, a fraction of what the plain model takes (`0.5`), or `"fit"` (the
            device's memory less a margin).
        of: What the budget is about: "peak", all that the gradient or the step takes, or "temp", the compiler's
            temporaries.
        max_cycles: Ask the other way round: the least memory within this time, in cycles of a whole step, and within
            the budget, if one is given.
        differentiate: False for a whole step, which takes its gradient itself, of the model that comes first.
        target: As in `measure`.
        max_compiles: The most programs to compile; those that an earlier plan left in the cache do not count.
        time_limit_s: After this time no further compile begins.
        cache: As in `measure`.
        progress: Called with a line of text before each compile.

    Returns:
        The fastest of all compiled points that keep the budget. Ctrl-C returns the best one so far.

    Raises:
        BudgetError: If the budget cannot be read or reached; with the least that was reached and what holds it there.
        MeasureError: If no block of the model has a backward pass here, or there is nothing to differentiate.
    """
    check_limits(budget, max_cycles)
    where = find_target(target)

    def choose(search: Exploration) -> int | None:
        plain = next(iter(search.points.values()))
        limit = None if budget is None else compute_budget_bytes(budget, target=where, plain_bytes=plain.bytes)
        return search.propose(limit, max_cycles)

    found = _explore(
        (loss_fn, model, batch),
        choose,
        count_cached=False,
        of=of,
        differentiate=differentiate,
        target=where,
        max_compiles=max_compiles,
        time_limit_s=time_limit_s,
        cache=cache,
        progress=progress,
    )
    try:
        return found.plan(budget, max_cycles=max_cycles)
    except BudgetError:
        if found.ended == "interrupted":
            raise KeyboardInterrupt("interrupted before any compiled rules kept the budget") from None
        raise


def frontier(
    loss_fn: Callable[..., Any],
    model: Any,
    *batch: Any,
    of: BudgetKind = "peak",
    differentiate: bool = True,
    target: str | Target | jax.Device | None = None,
    max_compiles: int = 8,
    time_limit_s: float | None = None,
    cache: Cache | str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> Frontier:
    """Compile the memory-time curve of a model once; `Frontier.plan` then answers every budget.

    Args:
        loss_fn: As in `plan`.
        model: Likewise.
        *batch: Likewise.
        of: Likewise.
        differentiate: Likewise.
        target: Likewise.
        max_compiles: The most points; those that an earlier call left in the cache count.
        time_limit_s: Likewise.
        cache: Likewise.
        progress: Likewise.

    Returns:
        All compiled points. Ctrl-C returns those compiled so far.

    Raises:
        MeasureError: If no block of the model has a backward pass here, or there is nothing to differentiate.
    """
    return _explore(
        (loss_fn, model, batch),
        Exploration.propose_for_frontier,
        count_cached=True,
        of=of,
        differentiate=differentiate,
        target=find_target(target),
        max_compiles=max_compiles,
        time_limit_s=time_limit_s,
        cache=cache,
        progress=progress,
    )


def _explore(
    subject: tuple[Callable[..., Any], Any, tuple[Any, ...]],
    choose: _ProposeNext,
    *,
    count_cached: bool,
    of: BudgetKind,
    differentiate: bool,
    target: Target,
    max_compiles: int,
    time_limit_s: float | None,
    cache: Cache | str | os.PathLike[str] | None,
    progress: Progress | None,
) -> Frontier:
    """Compile what `choose` says until it says nothing more."""
    _check_options(of, max_compiles, time_limit_s)
    loss_fn, model, batch = subject
    store = find_cache(cache)
    start = time.monotonic()
    shape = build_outline(loss_fn, model, batch, get_rates(target.name), differentiate=differentiate)

    def measure_rules(rules: Rules, rules_cache: Cache | None = store) -> Measurement:
        with application.applied(model, _REGIONS_OFF), application.applied(model, rules):
            return measure(loss_fn, model, *batch, target=target, differentiate=differentiate, cache=rules_cache)

    search = Exploration(
        space=Space(shape),
        measure_rules=measure_rules,
        of=of,
        plain_cycles=shape.count_plain_cycles(),
        progress=progress or (lambda _: None),
    )
    history = RuleHistory(store, shape, target.name)
    before = history.load_measurements(measure_rules)
    compiled, ended = 0, "converged"

    def find_stop_reason() -> str | None:
        if (len(search.points) if count_cached else compiled) >= max_compiles:
            return "max_compiles"
        late = time_limit_s is not None and time.monotonic() - start > time_limit_s
        return "time_limit" if late else None

    try:
        search.compile_assignment(search.space.assignments.index(search.space.plain))
        compiled = 1
        search.add_measurements(before)
        history.save(point.rules for point in search.points.values())
        while (number := choose(search)) is not None:
            if (reason := find_stop_reason()) is not None:
                ended = reason
                break
            search.compile_assignment(number)
            compiled += 1
            history.save(point.rules for point in search.points.values())
    except KeyboardInterrupt:
        if not search.points:
            raise
        ended = "interrupted"

    def describe_largest(point: Point) -> str:
        with application.applied(model, _REGIONS_OFF), application.applied(model, point.rules):
            alive = timeline(loss_fn, model, *batch, differentiate=differentiate).largest[:3]
        return "; ".join(f"{a.path} {a.name} {a.shape}: {format_bytes(a.bytes)}" for a in alive)

    points = tuple(search.points.values())
    no_cycles = any(point.measured.estimated_cycles is None for point in points if point.measured.fits)
    return Frontier(
        points=points,
        of=of,
        time_by="model" if no_cycles else "estimated_cycles",
        subject=_describe_subject(model, batch),
        target=target,
        holding=describe_largest,
        ended=ended,
    )


def _check_options(of: str, max_compiles: int, time_limit_s: float | None) -> None:
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
    if time_limit_s is not None:
        require_positive("time_limit_s", time_limit_s, "seconds", "600.0", or_zero=True)


def _describe_subject(model: Any, batch: tuple[Any, ...]) -> str:
    """A model and what comes with it, for people; of an argument with many arrays the number."""
    told = []
    for argument in batch:
        arrays = [leaf for leaf in jax.tree.leaves(argument) if hasattr(leaf, "shape")]
        shapes = [f"{leaf.dtype}{list(leaf.shape)}" for leaf in arrays]
        told += [f"{type(argument).__name__} of {len(arrays)} arrays"] if len(arrays) > _MAX_LISTED_ARRAYS else shapes
    return f"{type(model).__name__}, batch {', '.join(told) or 'none'}"
