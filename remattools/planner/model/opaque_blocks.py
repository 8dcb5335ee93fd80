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

PRIMITIVE = core.Primitive("plan_block")
PRIMITIVE.multiple_results = True


@dataclasses.dataclass(frozen=True, eq=False)
class Block:
    """One call of a block; compares by identity.

    Attributes:
        number: Shared by what the transforms make of it.
        path: Of its module.
        program: What it computes; equal blocks share the object.
    """

    number: int
    path: Path
    program: Any


class Blocks:
    """Takes the place of regions while a program is traced."""

    def __init__(self) -> None:
        self._traced: dict[Any, tuple[Any, Any]] = {}
        self._count = 0

    def __call__(self, run: Callable[[Any], Any], inputs: Any, path: Path) -> Any:
        """What `run(inputs)` returns, computed by opaque operations."""
        leaves, tree = jax.tree.flatten(inputs)
        key = (run, tree, tuple(map(jax.typeof, leaves)))
        program, made = self._traced.get(key, (None, None))
        consts: list[Any] = []
        if program is None:
            closed, shape = jax.make_jaxpr(run, return_shape=True)(inputs)
            program, made, consts = _without_constants(closed), jax.tree.structure(shape), list(closed.consts)
            if not consts:  # those may be tracers of this very call
                self._traced[key] = program, made
        self._count += 1
        results = _opaque(Block(self._count, path, program))(*consts, *leaves)
        return jax.tree.unflatten(made, results)


def _without_constants(closed: Any) -> Any:
    """The program with its constants as its first arguments."""
    inner = jaxprs.open_program(closed)
    return inner.replace(
        constvars=[],
        invars=[*inner.constvars, *inner.invars],
        debug_info=inner.debug_info._replace(arg_names=None, result_paths=None),
    )


def _opaque(block: Block) -> Callable[..., Any]:
    @jax.custom_vjp
    def call(*leaves: Any) -> Any:
        return PRIMITIVE.bind(*leaves, avals=_results(block.program), late=False, block=block)

    def forward(*leaves: Any) -> Any:
        return call(*leaves), leaves

    def backward(leaves: Any, cotangents: Any) -> Any:
        floats = [jax.numpy.issubdtype(leaf.dtype, jax.numpy.inexact) for leaf in leaves]
        wanted = tuple(jax.typeof(leaf) for leaf, is_float in zip(leaves, floats, strict=True) if is_float)
        given = [cotangent for cotangent in cotangents if cotangent.dtype != jax.dtypes.float0]
        made = iter(PRIMITIVE.bind(*leaves, *given, avals=wanted, late=True, block=block))
        return tuple(next(made) if is_float else None for is_float in floats)

    call.defvjp(forward, backward)
    return call


def _results(program: Any) -> tuple[Any, ...]:
    return tuple(atom.aval for atom in program.outvars)


PRIMITIVE.def_abstract_eval(lambda *_, avals, late, block: list(avals))


def _batched(args: Any, dims: Any, *, avals: Any, late: bool, block: Block) -> Any:
    """A block under `vmap` is a block of the batch."""
    size = next(arg.shape[dim] for arg, dim in zip(args, dims, strict=True) if dim is not None)
    if late:
        made = tuple(aval.update(shape=(size, *aval.shape)) for aval in avals)
    else:
        closed = core.ClosedJaxpr(block.program, [])  # type: ignore[attr-defined]  # public, but not in its stub
        run = jax.vmap(core.jaxpr_as_fun(closed), in_axes=tuple(dims), out_axes=0)
        program = _without_constants(jax.make_jaxpr(run)(*args))
        made, block = _results(program), Block(block.number, block.path, program)
    return PRIMITIVE.bind(*args, avals=made, late=late, block=block), [0] * len(made)


def _differentiated(*_: Any, block: Block, **__: Any) -> Any:
    raise twice(block.path)


def twice(path: Path) -> MeasureError:
    """A block is differentiated in a way that the planner has no model of."""
    where = ".".join(map(str, path)) or "a block"
    return MeasureError(
        what=f"{where} is differentiated twice, or forward (jax.jvp).",
        why="a plan says what lives from one forward pass to its backward pass.",
        fix="differentiate=False for a whole step, which takes its gradient itself; else plan the function without "
        "that term, and see by measure what the rules do for the whole.",
    )


batching.primitive_batchers[PRIMITIVE] = _batched
ad.primitive_jvps[PRIMITIVE] = _differentiated
