# SPDX-License-Identifier: Apache-2.0
"""A model's program around its blocks: which blocks there are, when each runs, what else is alive then.

Sits on `graph`. The call is traced once with every block a region, so that JAX itself
traces equal blocks once; each distinct block is differentiated once, and the program
around them with the blocks as opaque operations. The cost hardly grows with depth.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend import core

from ..errors import MeasureError
from ..measure import staging
from ..measure.program import loss_or_floats, named_program
from ..rules.paths import Path, format_path
from ..rules.rule import Remat
from ..rules.ruleset import Rules
from ..transform import apply as application
from ..transform import programs, scopes, swap
from ..transform.modules import modules_of
from .cost import Rates
from .graph import Graph, alive, block_graph, graph_of, inlined
from .solve import BlockProblem

_block = core.Primitive("plan_block")
_block.multiple_results = True
_block.def_abstract_eval(lambda *_, avals, tag: list(avals))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outline:
    """A call as blocks and what is around them.

    Attributes:
        rules: Patterns of the blocks, each with its action's methods.
        problems: One for each kind of block.
        visits: For each call of a block, in order, its path and its kind.
        around: The program with the blocks as single operations.
        rates: Of the target.
    """

    rules: tuple[tuple[str, tuple[str, ...]], ...]
    problems: tuple[BlockProblem, ...]
    visits: tuple[tuple[Path, int], ...]
    around: Graph
    rates: Rates

    @functools.cached_property
    def boundaries(self) -> tuple[int, ...]:
        """For each visit the bytes of its inputs that nothing else reads: there for its backward pass alone."""
        readers: dict[int, set[int]] = {}
        steps = (*self.around.forward, *self.around.backward)
        for number, step in enumerate(steps):
            visit = -1 - number if step.tag is None else step.tag[1]
            for value in step.reads:
                readers.setdefault(value, set()).add(visit)
        found = [0] * len(self.visits)
        for step in self.around.forward:
            if step.tag is not None:
                # What is added to the block's own output on the way (a residual stream) is read by the block alone.
                own = {value for value in step.reads if value in self.around.makers and readers[value] == {step.tag[1]}}
                found[step.tag[1]] = self.around.size(own)
        return tuple(found)

    def timetable(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Moments that can be the fullest.

        Returns:
            Bytes alive around the blocks at each moment; a matrix (moments, visits) of what each visit keeps then;
            and one of which visit runs: 1 forward, 2 backward.
        """
        order = (*self.around.forward, *self.around.backward)
        points = alive(self.around, order)
        starts, ends = [0] * len(self.visits), [len(order)] * len(self.visits)
        for number, step in enumerate(order):
            if step.tag is not None:
                (starts if step.tag[0] == "forward" else ends)[step.tag[1]] = number
        marks = sorted({*starts, *ends, 0, len(order)})
        chosen = {number for number in (*starts, *ends) if number < len(order)}
        for left, right in itertools.pairwise(marks):
            if left < right:  # between two blocks the same is kept: only the fullest moment matters
                chosen.add(max(range(left, right), key=lambda n: points[n] if order[n].tag is None else -1))
        moments = sorted(chosen)
        kept = np.array([[float(s < t < e) for s, e in zip(starts, ends, strict=True)] for t in moments])
        runs = np.array([[float(t == s) + 2 * (t == e) for s, e in zip(starts, ends, strict=True)] for t in moments])
        return np.array([float(points[t]) for t in moments]), kept, runs

    def plain_cycles(self) -> float:
        """The time of the whole without regions."""
        inside = sum(self.problems[kind].graph.total_cycles(self.rates) for _, kind in self.visits)
        return inside + sum(
            self.around.cycles(step, self.rates)
            for step in (*self.around.forward, *self.around.backward)
            if step.tag is None
        )


def outline(fn: Callable[..., Any], model: Any, args: Sequence[Any], rates: Rates) -> Outline:
    """Take a loss apart into blocks.

    Args:
        fn: A loss of the model and the other arguments.
        model: An nnx model, real or abstract.
        args: The other arguments.
        rates: Of the target.

    Raises:
        MeasureError: If no block of the model runs in the loss.
    """
    patterns = blocks_of(model)
    with (
        application.applied(model, Rules(((".", False), ("**", False)))),
        application.applied(model, Rules((pattern, Remat(methods=methods)) for pattern, methods in patterns)),
    ):
        call = staging.stage(staging.unjitted(fn), (model, *args))
        staging.check_differentiable(call)
        program = named_program(call, loss_or_floats)
    kinds: dict[Any, int] = {}
    by_id: dict[int, int] = {}
    distinct: list[Any] = []
    visits: list[tuple[Path, int]] = []

    def special(equation: Any, leaves: list[Any]) -> Any:
        if not programs.is_region(equation):
            if equation.primitive.name in _LOOPS:
                _refuse_blocks_in(equation, {pattern for pattern, _ in patterns})
            return None
        # Under jax_remat3 what is nested is the traced region, which holds its program.
        inner = programs.open_program(next(below for _, below in programs.nested(equation)))
        if id(inner) not in by_id:
            key = _signature(inner)
            by_id[id(inner)] = kinds.setdefault(key, len(distinct))
            if by_id[id(inner)] == len(distinct):
                distinct.append(inner)
        path = scopes.path_of(str(equation.source_info.name_stack)) or ()
        visits.append((path, by_id[id(inner)]))
        return _opaque(len(visits) - 1, [var.aval for var in equation.outvars])(*leaves)

    avals = call.abstract_leaves()

    def run(leaves: list[Any]) -> list[Any]:
        visits.clear()
        return inlined(program, leaves, special)

    around = graph_of(run, avals, {})
    if not visits:
        raise MeasureError(
            what="no block of the model runs in this loss.",
            why="a plan says what the blocks keep: members of lists and dicts, or the root's own children.",
            fix="pass a loss that calls the model.",
        )
    problems = tuple(BlockProblem(block_graph(inner), rates) for inner in distinct)
    return Outline(
        rules=tuple(patterns),
        problems=problems,
        visits=tuple(visits),
        around=around,
        rates=rates,
    )


_LOOPS = frozenset({"scan", "while", "cond"})


def _refuse_blocks_in(loop: Any, patterns: set[str]) -> None:
    """Raise if a loop runs blocks: each would have to be planned for all turns at once."""
    waiting = [below for _, below in programs.nested(loop)]
    while waiting:
        for equation in programs.open_program(waiting.pop()).eqns:
            waiting += [below for _, below in programs.nested(equation)]
            path = scopes.path_of(str(equation.source_info.name_stack)) if programs.is_region(equation) else None
            found = patterns & {format_path(path), format_path((*path[:-1], "*"))} if path else set()
            if found:
                raise MeasureError(
                    what=f"{format_path(path or ())} runs inside a {loop.primitive.name}, which is not planned yet.",
                    why="one choice would stand for all turns of the loop, and the plan would count it once.",
                    fix=f'rules by hand: compare(..., candidates={{"none": None, "all": {{"{min(found)}": '
                    '"nothing_saveable"}}), and group=k for stacked layers.',
                )


def blocks_of(model: Any) -> list[tuple[str, tuple[str, ...]]]:
    """Patterns of the blocks: members of lists and dicts that lie in no other block, or else the root's children.

    A list may hold lists or dicts; each of these is a sequence of blocks of its own.
    """
    entries = modules_of(model)
    owners = {entry.path for entry in entries if not entry.container}
    blocks: set[Path] = set()
    holders: dict[Path, set[str | None]] = {}
    for entry in entries:
        path = entry.path
        if entry.container or not path or any(path[:n] in blocks for n in range(len(path))):
            continue
        # An attribute is a part of its module; what its module holds in a list or a dict is one of several.
        owner = max((n for n in range(len(path)) if path[:n] in owners), default=-1 if entries[0].path == () else 0)
        if len(path) - owner < 2:
            continue
        method = _method(entry.module)
        holders.setdefault(path[:-1], set()).add(method)
        if method is not None:
            blocks.add(path)
    found: list[tuple[str, tuple[str, ...]]] = [
        (format_path((*holder, "*")), (str(next(iter(methods))),))
        for holder, methods in holders.items()
        if len(methods) == 1 and None not in methods
    ]
    if found:
        return found
    return [
        (format_path(entry.path), (str(_method(entry.module)),))
        for entry in entries
        if len(entry.path) == 1 and not entry.container and _method(entry.module) is not None
    ]


def _method(module: Any) -> str | None:
    methods = list(swap.methods_of(swap.base_class(type(module))))
    if "__call__" in methods:
        return "__call__"
    return methods[0] if len(methods) == 1 else None


def _signature(inner: Any) -> Any:
    """Equal for blocks that compute the same; those that JAX could not share are compared by their text."""
    opened = programs.open_program(inner)
    return (str(opened), tuple(str(e.source_info.name_stack) for e in opened.eqns))


def _opaque(number: int, avals: list[Any]) -> Callable[..., Any]:
    """A block as one operation forward and one backward."""

    @jax.custom_vjp
    def block(*leaves: Any) -> Any:
        return _block.bind(*leaves, avals=tuple(avals), tag=("forward", number))

    def forward(*leaves: Any) -> Any:
        return block(*leaves), leaves

    def backward(leaves: Any, cotangents: Any) -> Any:
        floats = [jax.numpy.issubdtype(leaf.dtype, jax.numpy.inexact) for leaf in leaves]
        wanted = tuple(jax.typeof(leaf) for leaf, is_float in zip(leaves, floats, strict=True) if is_float)
        given = [ct for ct in cotangents if ct.dtype != jax.dtypes.float0]
        made = iter(_block.bind(*leaves, *given, avals=wanted, tag=("backward", number)))
        return tuple(next(made) if is_float else None for is_float in floats)

    block.defvjp(forward, backward)
    return block
