# SPDX-License-Identifier: Apache-2.0
"""The outline of a traced program: its blocks, when each of them runs, and the program around them.

Sits on `schedule` and `block_ilp`. The function is traced once with every block as a single equation: a loss with its
gradient, a whole step as it is. So the program has both passes and everything around them. Equal blocks are traced
once, and each distinct block is differentiated once: the time hardly grows with depth.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from ... import compat
from ...compiler.partition import WHOLE_ARRAYS, DeviceSizes, find_device_sizes
from ...compiler.targets import Target
from ...errors import MeasureError
from ...jaxpr import jaxprs
from ...rules.paths import Path
from ...rules.policy_types import CallablePolicy
from ...rules.rule import Remat
from ...rules.ruleset import Rules
from ...tracing import pure_call
from ...transform import apply as application
from ...transform import region
from ...transform.naming import marking
from .block_detection import BlockPattern, find_blocks, find_loop_modules, find_members
from .block_ilp import BlockProblem
from .block_primitive import Block, BlockTracer, make_differentiation_error
from .dataflow_graph import Graph, build_block_graph
from .schedule import BLOCK_LABEL, Visit, build_schedule
from .time import Rates, count_plain_cycles


@dataclasses.dataclass(frozen=True)
class BlockKind:
    """Blocks that compute the same.

    Attributes:
        block: One of them.
        gradient_mask: For each of its float arguments, whether anything reads the gradient that one of them computes.
        stacked: Whether a loop stacks what they save.
    """

    block: Block
    gradient_mask: tuple[bool, ...]
    stacked: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outline:
    """A traced program as blocks and what is around them.

    Attributes:
        rules: Patterns of the blocks, each with the methods that are regions.
        kinds: The distinct blocks.
        visits: For each call of a block that has a backward pass, in order, its path and its number in `problems`.
        calls: The same calls, as positions in `around`.
        around: The program with its blocks as single steps.
        rates: Of the target.
        sizes: Sizes on one device.
    """

    rules: tuple[BlockPattern, ...]
    kinds: tuple[BlockKind, ...]
    visits: tuple[tuple[Path, int], ...]
    calls: tuple[Visit, ...]
    around: Graph
    rates: Rates
    sizes: DeviceSizes = WHOLE_ARRAYS

    @functools.cached_property
    def problems(self) -> tuple[BlockProblem, ...]:
        """The choices of each kind of block; made on first use, because differentiating a block takes a while."""
        problems = []
        for kind in self.kinds:
            block = kind.block
            with compat.bind_axes(block.axes):  # a block inside a `shard_map` is differentiated there
                graph = build_block_graph(block.jaxpr, kind.gradient_mask, path=block.path, sizes=self.sizes)
            problems.append(BlockProblem(graph, self.rates, stacked=kind.stacked))
        return tuple(problems)

    @property
    def iterations(self) -> np.ndarray:
        """How often the backward pass of each visit runs, shape (visits,)."""
        return np.array([call.iterations for call in self.calls])

    def count_plain_cycles(self) -> float:
        """Return the cycles of the whole program without regions."""
        block_cycles = [
            call.iterations * self.problems[kind].total_cycles
            for call, (_, kind) in zip(self.calls, self.visits, strict=True)
        ]
        return count_plain_cycles(self.around, block_cycles, self.rates)


def build_outline(
    fn: Callable[..., Any],
    model: Any,
    args: Sequence[Any],
    rates: Rates,
    *,
    differentiate: bool = True,
    target: Target | None = None,
) -> Outline:
    """Trace a loss or a whole step, and divide it into blocks and the program around them.

    Args:
        fn: A function of the model and the other arguments.
        model: An nnx model, real or abstract.
        args: The other arguments.
        rates: Of the target.
        differentiate: Whether `fn` is a loss, whose gradient is planned; False for a whole step.
        target: What sizes on a mesh are compiled for; None for the mesh's devices.

    Raises:
        MeasureError: If no block of the model runs in `fn`, or none has a backward pass.
    """
    patterns = find_members(model)
    sizes = find_subject_sizes(fn, model, args, target, differentiate=differentiate)
    program = _trace_blocks(fn, model, args, patterns, differentiate=differentiate)
    better = find_blocks(model, find_loop_modules(program))
    if better != patterns:
        patterns = better
        program = _trace_blocks(fn, model, args, patterns, differentiate=differentiate)
    around, calls = build_schedule(program, sizes)
    if not calls:
        raise _make_no_blocks_error(
            has_calls=any(step.label == BLOCK_LABEL for step in around.forward), differentiate=differentiate
        )
    signatures = {
        id(inner): _compute_signature(inner) for inner in {id(v.block.jaxpr): v.block.jaxpr for v in calls}.values()
    }
    keys = [(signatures[id(visit.block.jaxpr)], visit.copies > 1) for visit in calls]
    # Equal blocks are one kind: a gradient that one of them computes counts for all.
    gradient_masks: dict[Any, tuple[bool, ...]] = {}
    for key, visit in zip(keys, calls, strict=True):
        gradient_masks[key] = tuple(map(max, gradient_masks.get(key, visit.gradient_mask), visit.gradient_mask))
    numbers = {key: number for number, key in enumerate(gradient_masks)}
    kinds = tuple(BlockKind(calls[keys.index(key)].block, mask, key[1]) for key, mask in gradient_masks.items())
    visits = [(visit.block.path, numbers[key]) for visit, key in zip(calls, keys, strict=True)]
    return Outline(
        rules=tuple(patterns),
        kinds=kinds,
        visits=tuple(visits),
        calls=calls,
        around=around.fuse_products() if rates.fuses_products else around,
        rates=rates,
        sizes=sizes,
    )


def find_subject_sizes(
    fn: Callable[..., Any], model: Any, args: Sequence[Any], target: Target | None, *, differentiate: bool
) -> DeviceSizes:
    """Return the sizes on one device of the values of the plain program.

    Args:
        fn: A function of the model and the other arguments.
        model: An nnx model, real or abstract.
        args: The other arguments.
        target: What to compile for on a mesh; None for the mesh's devices.
        differentiate: Whether `fn` is a loss, whose gradient is planned.
    """
    with application.applied(model, Rules(((".", False), ("**", False)))):
        call = pure_call.stage(pure_call.unwrap_jit(fn), (model, *args))
        # Blocks are traced again by their shapes, without shardings.
        return find_device_sizes(call, target, differentiate=differentiate, with_types=False)


def _trace_blocks(
    fn: Callable[..., Any], model: Any, args: Sequence[Any], patterns: Sequence[BlockPattern], *, differentiate: bool
) -> Any:
    """Return the program with the modules of these patterns as single equations, and with module paths."""
    # JAX caches the traces of inner jits by policy, so this needs a policy that nothing else uses.
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
            if "custom_vjp" in str(error) or "custom_lin" in str(error):  # JAX refuses forward mode
                raise make_differentiation_error(()) from error
            raise
    return marking.mark_equations(program, {})


def _make_pure_with_paths(call: pure_call.Call, *, differentiate: bool) -> Callable[[list[Any]], Any]:
    """Return the function of a call's leaves, with module paths on its operations."""
    indices = call.differentiable_indices if differentiate else ()

    def evaluate_leaves(leaves: list[Any], chosen: list[Any]) -> tuple[Any, list[Any]]:
        return pure_call.evaluate(call, pure_call.replace_leaves(leaves, indices, chosen), with_paths=True)

    def compute_gradient(leaves: list[Any]) -> Any:
        loss = functools.partial(evaluate_leaves, leaves)
        return jax.grad(lambda chosen: pure_call.split_loss(loss(chosen)), has_aux=True)([leaves[i] for i in indices])

    return compute_gradient if differentiate else lambda leaves: evaluate_leaves(leaves, [])[1]


def _make_no_blocks_error(*, has_calls: bool, differentiate: bool) -> MeasureError:
    why = (
        "a plan says what each block saves; blocks are members of lists and dicts, layers in a scan, or the direct "
        "children of the model."
    )
    if differentiate or not has_calls:
        fix = "pass a loss that calls the model." if differentiate else "pass a step that calls the model."
        return MeasureError(what="no block of the model runs in this function.", why=why, fix=fix)
    return MeasureError(
        what="no block of the model has a backward pass in this function.",
        why="with differentiate=False the function has to compute the gradient itself; this one does not.",
        fix="differentiate=True (the default) for a loss; for a step, pass the model that it trains first.",
    )


def _compute_signature(jaxpr: Any) -> Any:
    """Return a value that is equal for blocks that compute the same, also where JAX did not share their jaxpr."""
    opened = jaxprs.open_jaxpr(jaxpr)
    return (str(opened), tuple(str(e.source_info.name_stack) for e in opened.eqns))
