# SPDX-License-Identifier: Apache-2.0
"""A JAX primitive that stands for one call of a block, so that a traced program shows blocks as single equations.

`outline` installs `BlockTracer` in place of the regions of `transform.region`. Equal blocks are traced once. The
derivative of a block, or a batch of it under `vmap`, is again one equation, so that a whole train step, or a loop over
blocks, is a short jaxpr.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jax.extend import core
from jax.interpreters import ad, batching

from ... import compat
from ...errors import MeasureError
from ...jaxpr import jaxprs
from ...rules.paths import Path

BLOCK_PRIMITIVE = core.Primitive("plan_block")
BLOCK_PRIMITIVE.multiple_results = True


@dataclasses.dataclass(frozen=True, eq=False)
class Block:
    """One call of a block; compares by identity.

    Attributes:
        number: Identifies the call; its derivative and its batched version have the same.
        path: Path of its module.
        jaxpr: Its forward pass; equal blocks share the object.
        axes: The named axes that are bound around it, as inside `shard_map`; from `compat.get_axes`.
    """

    number: int
    path: Path
    jaxpr: Any
    axes: Any = None


class BlockTracer:
    """Traces each region as one equation of `BLOCK_PRIMITIVE`."""

    def __init__(self) -> None:
        self._jaxprs: dict[Any, tuple[Any, Any]] = {}
        self._count = 0

    def __call__(self, run: Callable[[Any], Any], inputs: Any, path: Path) -> Any:
        """Return what `run(inputs)` returns, computed by one equation."""
        leaves, tree = jax.tree.flatten(inputs)
        key = (run, tree, tuple(map(jax.typeof, leaves)))
        jaxpr, out_tree = self._jaxprs.get(key, (None, None))
        consts: list[Any] = []
        if jaxpr is None:
            closed, shape = jax.make_jaxpr(run, return_shape=True)(inputs)
            jaxpr, out_tree, consts = _hoist_constants(closed), jax.tree.structure(shape), list(closed.consts)
            if not consts:  # those may be tracers of this very call
                self._jaxprs[key] = jaxpr, out_tree
        self._count += 1
        results = _make_block_call(Block(self._count, path, jaxpr, compat.get_axes()))(*consts, *leaves)
        return jax.tree.unflatten(out_tree, results)


def _hoist_constants(closed_jaxpr: Any) -> Any:
    """Return the jaxpr with its constants as its first arguments."""
    inner = jaxprs.open_jaxpr(closed_jaxpr)
    return inner.replace(
        constvars=[],
        invars=[*inner.constvars, *inner.invars],
        debug_info=inner.debug_info._replace(arg_names=None, result_paths=None),
    )


def _make_block_call(block: Block) -> Callable[..., Any]:
    @jax.custom_vjp
    def call(*leaves: Any) -> Any:
        return BLOCK_PRIMITIVE.bind(*leaves, avals=_get_result_avals(block.jaxpr), is_backward=False, block=block)

    def run_forward(*leaves: Any) -> Any:
        return call(*leaves), leaves

    def run_backward(leaves: Any, cotangents: Any) -> Any:
        floats = [jax.numpy.issubdtype(leaf.dtype, jax.numpy.inexact) for leaf in leaves]
        avals = tuple(jax.typeof(leaf) for leaf, is_float in zip(leaves, floats, strict=True) if is_float)
        cotangents = [cotangent for cotangent in cotangents if cotangent.dtype != jax.dtypes.float0]
        gradients = iter(BLOCK_PRIMITIVE.bind(*leaves, *cotangents, avals=avals, is_backward=True, block=block))
        return tuple(next(gradients) if is_float else None for is_float in floats)

    call.defvjp(run_forward, run_backward)
    return call


def _get_result_avals(jaxpr: Any) -> tuple[Any, ...]:
    return tuple(atom.aval for atom in jaxpr.outvars)


BLOCK_PRIMITIVE.def_abstract_eval(lambda *_, avals, is_backward, block: list(avals))


def _batch_block(args: Any, dims: Any, *, avals: Any, is_backward: bool, block: Block) -> Any:
    """Return a block under `vmap` as one block of the whole batch."""
    size = next(arg.shape[dim] for arg, dim in zip(args, dims, strict=True) if dim is not None)
    if is_backward:
        avals = tuple(aval.update(shape=(size, *aval.shape)) for aval in avals)
    else:
        closed = core.ClosedJaxpr(block.jaxpr, [])  # type: ignore[attr-defined]  # public, but not in its stub
        run = jax.vmap(core.jaxpr_as_fun(closed), in_axes=tuple(dims), out_axes=0)
        jaxpr = _hoist_constants(jax.make_jaxpr(run)(*args))
        avals, block = _get_result_avals(jaxpr), Block(block.number, block.path, jaxpr, block.axes)
    return BLOCK_PRIMITIVE.bind(*args, avals=avals, is_backward=is_backward, block=block), [0] * len(avals)


def _refuse_jvp(*_: Any, block: Block, **__: Any) -> Any:
    raise make_differentiation_error(block.path)


def make_differentiation_error(path: Path) -> MeasureError:
    """Return the error for a block that is differentiated in a way that the planner has no model of."""
    where = ".".join(map(str, path)) or "a block"
    return MeasureError(
        what=f"{where} is differentiated twice, or in forward mode (jax.jvp).",
        why="the planner predicts what is saved from one forward pass to its backward pass.",
        fix="differentiate=False if the function is a whole step, which computes its own gradient; otherwise plan the "
        "function without that term, and measure the rules on the whole.",
    )


batching.primitive_batchers[BLOCK_PRIMITIVE] = _batch_block
ad.primitive_jvps[BLOCK_PRIMITIVE] = _refuse_jvp
