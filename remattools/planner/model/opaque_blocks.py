# SPDX-License-Identifier: Apache-2.0
"""Blocks as single operations: one forward, one backward, whatever transform they are traced under.

Sits on `transform.region`, which hands over its regions. Equal blocks are traced once;
what the transforms make of a block (its derivative, a batch of it) stays one operation,
so that a whole train step, or a loop over blocks, is a short program.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jax.extend import core
from jax.interpreters import ad, batching

from ...errors import MeasureError
from ...jaxpr import jaxprs
from ...rules.paths import Path

BLOCK_PRIMITIVE = core.Primitive("plan_block")
BLOCK_PRIMITIVE.multiple_results = True


@dataclasses.dataclass(frozen=True, eq=False)
class Block:
    """One call of a block; compares by identity.

    Attributes:
        number: Shared by what the transforms make of it.
        path: Of its module.
        jaxpr: What it computes; equal blocks share the object.
    """

    number: int
    path: Path
    jaxpr: Any


class BlockTracer:
    """Takes the place of regions while a program is traced."""

    def __init__(self) -> None:
        self._jaxprs: dict[Any, tuple[Any, Any]] = {}
        self._count = 0

    def __call__(self, run: Callable[[Any], Any], inputs: Any, path: Path) -> Any:
        """What `run(inputs)` returns, computed by opaque operations."""
        leaves, tree = jax.tree.flatten(inputs)
        key = (run, tree, tuple(map(jax.typeof, leaves)))
        program, made = self._jaxprs.get(key, (None, None))
        consts: list[Any] = []
        if program is None:
            closed, shape = jax.make_jaxpr(run, return_shape=True)(inputs)
            program, made, consts = _hoist_constants(closed), jax.tree.structure(shape), list(closed.consts)
            if not consts:  # those may be tracers of this very call
                self._jaxprs[key] = program, made
        self._count += 1
        results = _make_block_call(Block(self._count, path, program))(*consts, *leaves)
        return jax.tree.unflatten(made, results)


def _hoist_constants(closed_jaxpr: Any) -> Any:
    """The program with its constants as its first arguments."""
    inner = jaxprs.open_jaxpr(closed_jaxpr)
    return inner.replace(
        constvars=[],
        invars=[*inner.constvars, *inner.invars],
        debug_info=inner.debug_info._replace(arg_names=None, result_paths=None),
    )


def _make_block_call(block: Block) -> Callable[..., Any]:
    @jax.custom_vjp
    def call(*leaves: Any) -> Any:
        return BLOCK_PRIMITIVE.bind(*leaves, avals=_get_result_avals(block.jaxpr), late=False, block=block)

    def run_forward(*leaves: Any) -> Any:
        return call(*leaves), leaves

    def run_backward(leaves: Any, cotangents: Any) -> Any:
        floats = [jax.numpy.issubdtype(leaf.dtype, jax.numpy.inexact) for leaf in leaves]
        wanted = tuple(jax.typeof(leaf) for leaf, is_float in zip(leaves, floats, strict=True) if is_float)
        given = [cotangent for cotangent in cotangents if cotangent.dtype != jax.dtypes.float0]
        made = iter(BLOCK_PRIMITIVE.bind(*leaves, *given, avals=wanted, late=True, block=block))
        return tuple(next(made) if is_float else None for is_float in floats)

    call.defvjp(run_forward, run_backward)
    return call


def _get_result_avals(jaxpr: Any) -> tuple[Any, ...]:
    return tuple(atom.aval for atom in jaxpr.outvars)


BLOCK_PRIMITIVE.def_abstract_eval(lambda *_, avals, late, block: list(avals))


def _batch_block(args: Any, dims: Any, *, avals: Any, late: bool, block: Block) -> Any:
    """A block under `vmap` is a block of the batch."""
    size = next(arg.shape[dim] for arg, dim in zip(args, dims, strict=True) if dim is not None)
    if late:
        made = tuple(aval.update(shape=(size, *aval.shape)) for aval in avals)
    else:
        closed = core.ClosedJaxpr(block.jaxpr, [])  # type: ignore[attr-defined]  # public, but not in its stub
        run = jax.vmap(core.jaxpr_as_fun(closed), in_axes=tuple(dims), out_axes=0)
        program = _hoist_constants(jax.make_jaxpr(run)(*args))
        made, block = _get_result_avals(program), Block(block.number, block.path, program)
    return BLOCK_PRIMITIVE.bind(*args, avals=made, late=late, block=block), [0] * len(made)


def _refuse_jvp(*_: Any, block: Block, **__: Any) -> Any:
    raise make_differentiation_error(block.path)


def make_differentiation_error(path: Path) -> MeasureError:
    """A block is differentiated in a way that the planner has no model of."""
    where = ".".join(map(str, path)) or "a block"
    return MeasureError(
        what=f"{where} is differentiated twice, or forward (jax.jvp).",
        why="a plan says what lives from one forward pass to its backward pass.",
        fix="differentiate=False for a whole step, which takes its gradient itself; else plan the function without "
        "that term, and see by measure what the rules do for the whole.",
    )


batching.primitive_batchers[BLOCK_PRIMITIVE] = _batch_block
ad.primitive_jvps[BLOCK_PRIMITIVE] = _refuse_jvp
