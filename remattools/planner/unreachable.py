# SPDX-License-Identifier: Apache-2.0
"""The error of a budget that no compiled rules meet: what was compiled, what no rule can reach, and what helps.

Sits on `result`. Every suggestion can be pasted, and its numbers come from the compiled points.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
from flax import nnx

from ..analysis.random_cost import CHANGE_KEYS, SAVE_MASKS
from ..compiler.out_of_memory import Allocation
from ..errors import BudgetError
from ..jaxpr import jaxprs
from ..text import format_bytes
from ..transform.author_regions import AuthorRegion
from .budget import BudgetKind
from .model.outline import Outline
from .result import EndReason, Point, format_points

_MAX_BUFFERS = 5
_RANDOM_LABELS = frozenset({"random_bits", "threefry2x32"})
_UNITS = (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProgramFacts:
    """What is known of a planned program besides its compiled points.

    Attributes:
        patterns: Patterns of its blocks.
        rows: Leading dimension that all arrays of the batch share; None if they share none.
        is_step: Whether it is a whole step, whose arguments it could overwrite.
        has_threefry: Whether its blocks draw random bits from keys of the default implementation.
        find_live: Returns the values live at the peak of the traced program under the rules of a point.
        author_regions: Regions in the model's own code that blocks run in.
    """

    patterns: tuple[str, ...]
    rows: int | None
    is_step: bool
    has_threefry: bool
    find_live: Callable[[Point], tuple[Allocation, ...]]
    author_regions: tuple[AuthorRegion, ...] = ()


def collect_facts(
    outline: Outline,
    model: Any,
    batch: tuple[Any, ...],
    find_live: Callable[[Point], tuple[Allocation, ...]],
    *,
    is_step: bool,
) -> ProgramFacts:
    """Return what is known of a program.

    Args:
        outline: Its outline.
        model: The model.
        batch: The other arguments.
        find_live: Returns the values live at the peak under the rules of a point.
        is_step: Whether the function is a whole step.
    """
    labels = {label for kind in outline.kinds for label in _find_operations(kind.block.jaxpr)}
    return ProgramFacts(
        patterns=tuple(pattern for pattern, _ in outline.rules),
        rows=_find_rows(batch),
        is_step=is_step,
        has_threefry=bool(labels & _RANDOM_LABELS) and _has_threefry_keys((model, *batch)),
        find_live=find_live,
        author_regions=tuple(dict.fromkeys(c.author_region for c in outline.calls if c.author_region is not None)),
    )


def make_unreachable_error(
    points: Iterable[Point],
    limit: int,
    of: BudgetKind,
    ended: EndReason,
    facts: ProgramFacts,
    *,
    skipped: bool,
    notes: Iterable[str] = (),
) -> BudgetError:
    """Return the error for a budget that no compiled point is within.

    Args:
        points: The compiled points.
        limit: The budget in bytes.
        of: What it is about.
        ended: What ended the search.
        facts: What else is known of the program.
        skipped: Whether the search ended before saving nothing on every block was compiled.
        notes: What else to know of the points.
    """
    points = tuple(points)
    smallest = min(points, key=lambda point: (not point.measured.fits, point.bytes))
    if smallest.measured.fits:
        reached = f"the minimum reached is {smallest.bytes} bytes ({format_bytes(smallest.bytes)})"
    else:
        reached = f"every program runs out of memory, the smallest needs {format_bytes(smallest.bytes)}"
    why = [
        f"saving nothing on {', '.join(facts.patterns)} was "
        + ("not compiled yet." if skipped else "among the rules that were compiled:"),
        *format_points(points, of, None).splitlines(),
        *notes,
        *_describe_peak(smallest, of, facts),
        *(f"blocks run inside {region}, which decides what they save;" for region in facts.author_regions),
    ]
    fixes = list(_suggest_fixes(points, smallest, limit, of, ended, facts))
    return BudgetError(
        what=f"no compiled rules stay within {format_bytes(limit)} of {of}; {reached}.",
        why="\n    ".join(why),
        fix="\n    or ".join(fixes),
    )


def format_budget(count: int) -> str:
    """Return bytes as a budget to paste, rounded up.

    Example:
        >>> format_budget(21874532), format_budget(2**30), format_budget(700)
        ('20.9MiB', '1GiB', '700B')
    """
    for unit, size in _UNITS:
        if count >= size:
            tenths = math.ceil(10 * count / size)
            # The number is read as a float again, which may be a byte less.
            tenths += int(float(f"{tenths / 10:.1f}") * size) < count
            return f"{tenths / 10:.1f}".removesuffix(".0") + unit
    return f"{count}B"


def _describe_peak(point: Point, of: BudgetKind, facts: ProgramFacts) -> Iterator[str]:
    """Yield lines on what is live at the minimum, apart into what rules can and cannot reach."""
    measured = point.measured
    live = sorted(facts.find_live(point), key=lambda value: -value.bytes)
    yield "at that minimum, no rule can reach (values are those of the traced program):"
    if of == "peak":
        yield _format_value(measured.argument_bytes, "arguments: parameters, batch" + ", state" * facts.is_step)
        results = max(measured.output_bytes - measured.alias_bytes, 0)
        yield _format_value(
            results, "results" + (" that no donated argument holds" if facts.is_step else ": gradients")
        )
    # The outermost region of a group has no module of its own; what it returns lies between blocks.
    inside = [
        value for value in live if value.name in jaxprs.REGION_PRIMITIVES or _is_in_block(value.path, facts.patterns)
    ]
    outside = [value for value in live if value not in inside]
    yield from map(_format_allocation, outside[:_MAX_BUFFERS])
    if inside:
        yield "and of the blocks, these are live:"
        yield from map(_format_allocation, inside[:_MAX_BUFFERS])


def _format_allocation(value: Allocation) -> str:
    count = f" x{value.count}" if value.count > 1 else ""
    return _format_value(value.bytes, f"{value.path}  {value.name}  {value.shape}{count}")


def _format_value(count: int, text: str) -> str:
    return f"{format_bytes(count):>11}  {text}"


def _is_in_block(path: str, patterns: Iterable[str]) -> bool:
    """Whether a path, which may stand for several modules, is that of a block or of a module in one."""
    holders = [pattern.partition("*")[0].rstrip(".") for pattern in patterns]
    return any(path == holder or path.startswith(f"{holder}.") for holder in holders if holder)


def _suggest_fixes(
    points: tuple[Point, ...], smallest: Point, limit: int, of: BudgetKind, ended: EndReason, facts: ProgramFacts
) -> Iterator[str]:
    measured = smallest.measured
    if measured.fits:
        yield f'budget="{format_budget(smallest.bytes)}", which the smallest of these rules meets;'
    fixed = measured.argument_bytes + measured.output_bytes - measured.alias_bytes if of == "peak" else 0
    if facts.rows is not None and facts.rows > 1 and smallest.bytes > fixed:
        rows = math.floor(facts.rows * (limit - fixed) / (smallest.bytes - fixed)) if limit > fixed else 0
        if rows >= 1:
            yield f"fewer rows: about {rows} instead of {facts.rows}, in proportion to this measurement;"
        elif of == "peak" and limit <= fixed:
            yield (
                f"more devices or a smaller model: arguments and results take {format_bytes(fixed)} whatever the batch;"
            )
        else:
            yield f"shorter sequences: in proportion to this measurement, 1 row instead of {facts.rows} takes more;"
    if facts.has_threefry:
        yield f"{CHANGE_KEYS};"
        if not any(_is_saving_masks(point) for point in points):
            yield f"dropout masks saved in rules of your own, 1 byte for each element: {SAVE_MASKS};"
    undonated = min(measured.argument_bytes, measured.output_bytes) - measured.alias_bytes
    if of == "peak" and facts.is_step and undonated > 0.01 * smallest.bytes:
        yield (
            "donation: nnx.jit(step, donate_argnums=(0, 1)) of model and optimizer reuses up to "
            f"{format_bytes(undonated)} of arguments for results;"
        )
    if facts.author_regions:
        yield "the model's own rematerialisation switched off (such as remat_policy), so that rules take its place;"
    if ended == "time_limit":
        yield "more time than time_limit_s (--time-limit), which ended the search;"
    elif ended == "max_compiles":
        yield f"more compiles than these {len(points)} points (max_compiles=, --max-compiles);"
    yield "logits and the like in pieces, so that they never exist whole: rt.plan(rt.tile(loss), ...)."


def _is_saving_masks(point: Point) -> bool:
    return any(action and action.policy and action.policy.has_dropout_masks for _, action in point.rules)


def _find_operations(jaxpr: Any) -> Iterator[str]:
    for equation in jaxprs.open_jaxpr(jaxpr).eqns:
        yield equation.primitive.name
        for _, inner in jaxprs.find_subjaxprs(equation):
            yield from _find_operations(inner)


def _find_rows(batch: tuple[Any, ...]) -> int | None:
    """Return the leading dimension that all arrays of the plain arguments share."""
    arguments = [argument for argument in batch if not isinstance(argument, nnx.Pytree)]
    arrays = [leaf for argument in arguments for leaf in jax.tree.leaves(argument) if getattr(leaf, "shape", ())]
    rows = {int(leaf.shape[0]) for leaf in arrays}
    return rows.pop() if len(rows) == 1 else None


def _has_threefry_keys(values: Any) -> bool:
    """Whether a key of the default implementation is among the values; keys have the dtype `key<fry>`."""
    return any("key<fry>" in str(getattr(leaf, "dtype", "")) for leaf in jax.tree.leaves(values))
