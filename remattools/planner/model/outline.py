# SPDX-License-Identifier: Apache-2.0
"""A model's program around its blocks: which blocks there are, when each runs, what else is alive then.

Sits on `schedule` and `blocks`. The call is traced once with every block opaque, a loss
with its gradient and a whole step as it is, so that the program has both passes and all
that is around them. Equal blocks are traced once, and each distinct block is
differentiated once. The cost hardly grows with depth.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from ...errors import MeasureError
from ...jaxpr import jaxprs
from ...rules.paths import Path
from ...rules.policy import CallablePolicy
from ...rules.rule import Remat
from ...rules.ruleset import Rules
from ...tracing import pure_call
from ...transform import apply as application
from ...transform import region
from ...transform.naming import names
from .block_ilp import BlockProblem
from .blocks import BlockPattern, find_blocks, find_loop_modules, find_members
from .graph import Graph, build_block_graph, compute_live_bytes
from .op_cost import Rates
from .opaque_blocks import BlockTracer, make_differentiation_error
from .schedule import BLOCK_LABEL, Visit, build_schedule


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outline:
    """A call as blocks and what is around them.

    Attributes:
        rules: Patterns of the blocks, each with its action's methods.
        problems: One for each kind of block.
        visits: For each call of a block that has a backward pass, in order, its path and its kind.
        calls: The same calls, as places in the program.
        around: The program with the blocks as single operations.
        rates: Of the target.
    """

    rules: tuple[BlockPattern, ...]
    problems: tuple[BlockProblem, ...]
    visits: tuple[tuple[Path, int], ...]
    calls: tuple[Visit, ...]
    around: Graph
    rates: Rates

    @property
    def iterations(self) -> np.ndarray:
        """How often the backward pass of each visit runs."""
        return np.array([call.iterations for call in self.calls])

    @functools.cached_property
    def boundary_bytes(self) -> tuple[int, ...]:
        """For each visit the bytes of its inputs that nothing else reads: there for its backward pass alone."""
        readers: dict[int, set[int]] = {}
        for number, step in enumerate(self.around.forward):
            visit = -1 - number if step.tag is None else step.tag[1]
            for value in step.reads:
                readers.setdefault(value, set()).add(visit)
        found = []
        for visit, call in enumerate(self.calls):
            # What is added to the block's own output on the way (a residual stream) is read by the block alone.
            inputs = self.around.forward[call.forward].reads
            found.append(
                self.around.count_bytes(v for v in inputs if v in self.around.producers and readers[v] == {visit})
            )
        return tuple(found)

    def build_timetable(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Moments that can be the fullest.

        Returns:
            Bytes alive around the blocks at each moment; a matrix (moments, visits) of how often what each visit keeps
            is there then; and one of which visit runs: 1 forward, 2 backward.
        """
        order = self.around.forward
        points = compute_live_bytes(self.around, order)
        ends = {number for call in self.calls for number in (call.first, call.forward, call.backward, call.last)}
        chosen = {number for call in self.calls for number in (call.forward, call.backward)}
        for left, right in itertools.pairwise(sorted({*ends, 0, len(order)})):
            if left < right:  # between two blocks the same is kept: only the fullest moment matters
                chosen.add(max(range(left, right), key=lambda n: points[n] if order[n].tag is None else -1))
        moments = sorted(chosen)
        kept = np.array([[float(c.copies * (c.first < t < c.last)) for c in self.calls] for t in moments])
        runs = np.array([[float(t == c.forward) + 2 * (t == c.backward) for c in self.calls] for t in moments])
        return np.array([float(points[t]) for t in moments]), kept, runs

    def count_plain_cycles(self) -> float:
        """The time of the whole without regions."""
        costs = [problem.graph.count_total_cycles(self.rates) for problem in self.problems]
        inside = sum(call.iterations * costs[kind] for call, (_, kind) in zip(self.calls, self.visits, strict=True))
        return inside + sum(
            self.around.count_cycles(step, self.rates) for step in self.around.forward if step.tag is None
        )


def build_outline(
    fn: Callable[..., Any], model: Any, args: Sequence[Any], rates: Rates, *, differentiate: bool = True
) -> Outline:
    """Take a loss or a whole step apart into blocks.

    Args:
        fn: A function of the model and the other arguments.
        model: An nnx model, real or abstract.
        args: The other arguments.
        rates: Of the target.
        differentiate: Whether `fn` is a loss, whose gradient is meant.

    Raises:
        MeasureError: If no block of the model runs in it, or none has a backward pass.
    """
    patterns = find_members(model)
    program = _trace_blocks(fn, model, args, patterns, differentiate=differentiate)
    better = find_blocks(model, find_loop_modules(program))
    if better != patterns:
        patterns = better
        program = _trace_blocks(fn, model, args, patterns, differentiate=differentiate)
    around, calls = build_schedule(program)
    if not calls:
        raise _make_no_blocks_error(
            has_calls=any(step.label == BLOCK_LABEL for step in around.forward), differentiate=differentiate
        )
    texts = {
        id(inner): _compute_signature(inner) for inner in {id(v.block.jaxpr): v.block.jaxpr for v in calls}.values()
    }
    # Equal blocks are one problem: a gradient that one of them has to make counts for all.
    keys = [(texts[id(visit.block.jaxpr)], visit.copies > 1) for visit in calls]
    wanted: dict[Any, tuple[bool, ...]] = {}
    for key, visit in zip(keys, calls, strict=True):
        wanted[key] = tuple(map(max, wanted.get(key, visit.gradient_mask), visit.gradient_mask))
    kinds = {key: number for number, key in enumerate(wanted)}
    firsts = [calls[keys.index(key)].block.jaxpr for key in kinds]
    problems = [
        BlockProblem(build_block_graph(inner, wanted[key]), rates, stacked=key[1])
        for key, inner in zip(kinds, firsts, strict=True)
    ]
    visits = [(visit.block.path, kinds[key]) for visit, key in zip(calls, keys, strict=True)]
    return Outline(
        rules=tuple(patterns),
        problems=tuple(problems),
        visits=tuple(visits),
        calls=calls,
        around=around.adapt_to(rates),
        rates=rates,
    )


def _trace_blocks(
    fn: Callable[..., Any], model: Any, args: Sequence[Any], patterns: Sequence[BlockPattern], *, differentiate: bool
) -> Any:
    """The program with the modules of these patterns opaque, and with module paths."""
    # JAX keeps traces of inner jits, so that the opaque blocks need a policy that nobody else has.
    policy = CallablePolicy(lambda *_, **__: False)
    rules = Rules((pattern, Remat(policy, methods=methods)) for pattern, methods in patterns)
    with (
        application.applied(model, Rules(((".", False), ("**", False)))),
        application.applied(model, rules),
        region.replace_regions(policy, BlockTracer()),
    ):
        call = pure_call.stage(pure_call.unwrap_jit(fn), (model, *args))
        if differentiate:
            pure_call.check_differentiable(call)
        try:
            program = jax.make_jaxpr(_make_pure_with_paths(call, differentiate=differentiate))(
                call.abstractify_leaves()
            )
        except (TypeError, NotImplementedError) as error:
            if "custom_vjp" in str(error) or "custom_lin" in str(error):  # JAX's own refusals to go forward
                raise make_differentiation_error(()) from error
            raise
    return names.mark_equations(program, {})


def _make_pure_with_paths(call: pure_call.Call, *, differentiate: bool) -> Callable[[list[Any]], Any]:
    """As `staging.pure`, with module paths on the operations."""
    indices = call.differentiable_indices if differentiate else ()

    def evaluate_leaves(leaves: list[Any], chosen: list[Any]) -> tuple[Any, list[Any]]:
        return pure_call.evaluate(call, pure_call.replace_leaves(leaves, indices, chosen), with_paths=True)

    def compute_gradient(leaves: list[Any]) -> Any:
        loss = functools.partial(evaluate_leaves, leaves)
        return jax.grad(lambda chosen: pure_call.split_loss(loss(chosen)), has_aux=True)([leaves[i] for i in indices])

    return compute_gradient if differentiate else lambda leaves: evaluate_leaves(leaves, [])[1]


def _make_no_blocks_error(*, has_calls: bool, differentiate: bool) -> MeasureError:
    why = "a plan says what the blocks keep: members of lists and dicts, layers in a scan, or the root's own children."
    if differentiate or not has_calls:
        fix = "pass a loss that calls the model." if differentiate else "pass a step that calls the model."
        return MeasureError(what="no block of the model runs in this function.", why=why, fix=fix)
    return MeasureError(
        what="no block of the model has a backward pass in this function.",
        why="with differentiate=False the function takes its gradient itself; this one takes none of the model's.",
        fix="a loss goes with differentiate=True (the default); a step takes the model that it trains first.",
    )


def _compute_signature(jaxpr: Any) -> Any:
    """Equal for blocks that compute the same; those that JAX could not share are compared by their text."""
    opened = jaxprs.open_jaxpr(jaxpr)
    return (str(opened), tuple(str(e.source_info.name_stack) for e in opened.eqns))
