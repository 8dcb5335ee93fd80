# SPDX-License-Identifier: Apache-2.0
"""`plan`: find rules within a memory budget, verified by the compiler; `frontier`: the same for all budgets at once.

Sits on everything else in `planner`. The search ends when no compile promises an improvement, at the limit of compiles
or of time, or at Ctrl-C; the result is what was compiled until then.
"""

import os
import time
from collections.abc import Callable
from typing import Any

import jax

from ..analysis.measure import measure
from ..analysis.random_cost import Redrawn, find_redrawn_in_call
from ..analysis.timeline import timeline
from ..compiler.cache import Cache, find_cache
from ..compiler.out_of_memory import Allocation
from ..compiler.report import Measurement
from ..compiler.targets import Target, find_target
from ..errors import BudgetError
from ..rules.ruleset import Rules
from ..terminal.progress import CompileLog, Progress, open_progress
from ..transform import apply as application
from .budget import BudgetKind, compute_budget_bytes, require_positive, select_bytes
from .frontier import Frontier, check_limits
from .model.outline import Outline, build_outline
from .model.time import get_rates
from .notes import collect_notes
from .result import EndReason, Plan, Point
from .search.exploration import Exploration
from .search.history import RuleHistory
from .search.minimum import Minimum
from .search.next_compile import find_best_point
from .search.run_search import Limits, ProposeNext, run_search
from .search.space import Space
from .unreachable import collect_facts

_REGIONS_OFF = Rules(((".", False), ("**", False)))
# For arguments with more arrays a rule file says how many there are, not which.
_MAX_LISTED_ARRAYS = 8


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
    progress: Progress | bool | None = None,
) -> Plan:
    """Find rules within a memory budget that recompute as little as possible.

    Args:
        loss_fn: A loss of the model and the batch; or with `differentiate=False` a whole step of the model, the
            optimizer and the batch, jitted or not.
        model: An nnx model, real or abstract; rules already applied to it are ignored.
        *batch: The other arguments of `loss_fn`, real or abstract.
        budget: Bytes, a string such as `"12GiB"`, a fraction of what the plain model takes (`0.5`), or `"fit"` (the
            device's memory minus a margin). None if `max_cycles` is the only limit.
        of: What the budget is about: "peak", all memory that the gradient or the step takes, or "temp", the compiler's
            temporaries.
        max_cycles: A time limit, in cycles of a whole step. With it the plan has the minimum memory within this time
            (and within the budget, if one is given), rather than the minimum time.
        differentiate: Whether `loss_fn` is a loss, whose gradient is planned. False for a whole step, which computes
            the gradient of its first argument itself.
        target: What to compile for: "cpu", "gpu", a TPU topology such as "tpu:v5e:2x2", a device, or a `Target`; the
            default device by default.
        max_compiles: The most programs to compile, 2 or more; measurements from the cache do not count. Before a budget
            is called unreachable, saving nothing on every block and on groups of them is compiled in any case.
        time_limit_s: Seconds after which no further compile starts; None for no limit.
        cache: A directory or `Cache` for measurements; by default the one of the environment variable
            REMATTOOLS_CACHE, or none.
        progress: A function that is called with a line of text before each compile. By default the line is shown in
            place at a terminal or in a notebook, and is otherwise a record of the logger "remattools" at level INFO;
            False for nowhere.

    Returns:
        The fastest compiled point within the budget. After Ctrl-C, the best one so far.

    Raises:
        BudgetError: If the budget is not valid, or no compiled point is within it; the message has all compiled points,
            the minimum reached, what no rule can reach, and what helps.
        MeasureError: If no block of the model has a backward pass in `loss_fn`, or there is nothing to differentiate.

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
        >>> model, x = MLP(), jnp.ones((64, 16))
        >>> plan = rt.plan(lambda m, x: m(x).sum(), model, x, budget="1MiB", target="cpu", max_compiles=2)
        >>> plan.measured.total_bytes <= 2**20
        True
        >>> model = rt.apply(model, plan.rules)
    """
    check_limits(budget, max_cycles)
    where = find_target(target)

    def find_limit(plain: Point) -> int | None:
        return None if budget is None else compute_budget_bytes(budget, target=where, plain_bytes=plain.bytes)

    def is_enough(plain: Point) -> bool:
        return max_cycles is None and find_best_point([plain], find_limit(plain), None) is not None

    def choose(search: Exploration) -> int | None:
        return search.propose(find_limit(search.all_points[0]), max_cycles)

    def is_within(search: Exploration) -> bool:
        points = search.all_points
        return find_best_point(points, find_limit(points[0]), max_cycles) is not None

    found = _explore(
        (loss_fn, model, batch),
        is_enough,
        choose,
        is_within,
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
            raise KeyboardInterrupt("interrupted before any compiled rules were within the budget") from None
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
    progress: Progress | bool | None = None,
) -> Frontier:
    """Compile the memory-time curve of a model once; `Frontier.plan` then answers every budget.

    Args:
        loss_fn: A loss of the model and the batch; or with `differentiate=False` a whole step of the model, the
            optimizer and the batch, jitted or not.
        model: An nnx model, real or abstract; rules already applied to it are ignored.
        *batch: The other arguments of `loss_fn`, real or abstract.
        of: What budgets are about: "peak", all memory that the gradient or the step takes, or "temp", the compiler's
            temporaries.
        differentiate: Whether `loss_fn` is a loss, whose gradient is planned. False for a whole step, which computes
            the gradient of its first argument itself.
        target: What to compile for: "cpu", "gpu", a TPU topology such as "tpu:v5e:2x2", a device, or a `Target`; the
            default device by default.
        max_compiles: The most points, 2 or more; points of earlier calls, whose measurements are in the cache, count.
        time_limit_s: Seconds after which no further compile starts; None for no limit.
        cache: A directory or `Cache` for measurements; by default the one of the environment variable
            REMATTOOLS_CACHE, or none.
        progress: A function that is called with a line of text before each compile. By default the line is shown in
            place at a terminal or in a notebook, and is otherwise a record of the logger "remattools" at level INFO;
            False for nowhere.

    Returns:
        All compiled points. After Ctrl-C, those compiled so far.

    Raises:
        MeasureError: If no block of the model has a backward pass in `loss_fn`, or there is nothing to differentiate.

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
        >>> len(curve.points)
        2
    """
    return _explore(
        (loss_fn, model, batch),
        lambda _: False,
        Exploration.propose_for_frontier,
        lambda _: True,
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
    is_enough: Callable[[Point], bool],
    choose: ProposeNext,
    is_within: Callable[[Exploration], bool],
    *,
    count_cached: bool,
    of: BudgetKind,
    differentiate: bool,
    target: Target,
    max_compiles: int,
    time_limit_s: float | None,
    cache: Cache | str | os.PathLike[str] | None,
    progress: Progress | bool | None,
) -> Frontier:
    """Compile what `choose` proposes until it proposes nothing or a limit is reached.

    The plain model is compiled first: if `is_enough` accepts it, nothing else is computed. Before the result is without
    a point that `is_within` accepts, everything that saves nothing is compiled, beyond `max_compiles` if need be.
    """
    _check_options(of, max_compiles, time_limit_s)
    loss_fn, model, batch = subject
    store = find_cache(cache)
    start = time.monotonic()

    def measure_rules(rules: Rules, rules_cache: Cache | None = store) -> Measurement:
        with application.applied(model, _REGIONS_OFF), application.applied(model, rules):
            return measure(loss_fn, model, *batch, target=target, differentiate=differentiate, cache=rules_cache)

    def find_live(point: Point) -> tuple[Allocation, ...]:
        with application.applied(model, _REGIONS_OFF), application.applied(model, point.rules):
            return timeline(loss_fn, model, *batch, differentiate=differentiate).largest

    def find_redrawn_bits(point: Point) -> tuple[Redrawn, ...]:
        with application.applied(model, _REGIONS_OFF), application.applied(model, point.rules):
            return find_redrawn_in_call(loss_fn, (model, *batch), differentiate=differentiate)

    search: Exploration | None = None
    minimum: Minimum | None = None
    ended: EndReason = "converged"
    with open_progress(progress) as show:
        # A function of the user's is called before compiles only; the other steps are for people who wait.
        show_step = (lambda _: None) if callable(progress) else show
        show_step("tracing the model")
        rates = get_rates(target.name)
        outline = build_outline(loss_fn, model, batch, rates, differentiate=differentiate, target=target)
        log = CompileLog(show)
        with log.compile("the plain model", remaining=max_compiles - 1):
            measured = measure_rules(Rules())
        plain = _make_plain_point(outline, measured, of)
        try:
            if not is_enough(plain):
                show_step(f"choosing what to save, for {len(outline.kinds)} different blocks")
                search = Exploration(
                    space=Space(outline),
                    measure_rules=measure_rules,
                    of=of,
                    plain_cycles=outline.count_plain_cycles(),
                    log=log,
                )
                minimum = Minimum(search, model)
                history = RuleHistory(store, outline, target.name)
                search.add_plain(measured)
                search.add_measurements(history.load_measurements(measure_rules))
                limits = Limits(max_compiles, count_cached, None if time_limit_s is None else start + time_limit_s)
                ended = run_search(search, minimum, history, choose, is_within, limits)
        except KeyboardInterrupt:
            ended = "interrupted"
    points = (search.all_points if search is not None else ()) or (plain,)
    no_cycles = any(point.measured.estimated_cycles is None for point in points if point.measured.fits)
    return Frontier(
        points=points,
        of=of,
        time_by="model" if no_cycles else "estimated_cycles",
        subject=_describe_subject(model, batch),
        target=target,
        program=collect_facts(outline, model, batch, find_live, is_step=not differentiate),
        ended=ended,
        has_minimum=minimum is not None and minimum.is_compiled,
        notes=collect_notes(outline, points, find_redrawn_bits),
    )


def _make_plain_point(outline: Outline, measured: Measurement, of: BudgetKind) -> Point:
    cycles = measured.estimated_cycles
    return Point(
        rules=Rules(),
        predicted=None,
        measured=measured,
        bytes=select_bytes(measured, of),
        cycles=float("inf" if not measured.fits else outline.count_plain_cycles() if cycles is None else cycles),
    )


def _check_options(of: str, max_compiles: int, time_limit_s: float | None) -> None:
    if of not in ("peak", "temp"):
        raise BudgetError(
            what=f"of={of!r} is not something that a budget can be about.",
            why='"peak" counts parameters, gradients and temporaries, "temp" the temporaries alone.',
            fix='of="peak" or of="temp".',
        )
    if type(max_compiles) is not int or max_compiles < 2:
        raise BudgetError(
            what=f"max_compiles={max_compiles!r} is not an int of 2 or more.",
            why="the plain model is compiled first, and at least one set of rules after it.",
            fix="max_compiles=8.",
        )
    if time_limit_s is not None:
        require_positive("time_limit_s", time_limit_s, "seconds", "600.0", or_zero=True)


def _describe_subject(model: Any, batch: tuple[Any, ...]) -> str:
    """Return the model and the batch for people: the arrays of an argument, or their number if there are many."""
    parts: list[str] = []
    for argument in batch:
        arrays = [leaf for leaf in jax.tree.leaves(argument) if hasattr(leaf, "shape")]
        shapes = [f"{leaf.dtype}{list(leaf.shape)}" for leaf in arrays]
        parts += [f"{type(argument).__name__} of {len(arrays)} arrays"] if len(arrays) > _MAX_LISTED_ARRAYS else shapes
    return f"{type(model).__name__}, batch {', '.join(parts) or 'none'}"
