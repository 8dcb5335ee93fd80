# SPDX-License-Identifier: Apache-2.0
"""Operations whose derivative reads their own result: `exp`, `tanh`, `logistic`, `rsqrt`, `reduce_max`.

Sits on `programs`; `names` calls it. A `checkpoint_name` behind such an operation names a
copy: the derivative still reads the unnamed result, so that the backward pass makes it again,
with all that it was made of, and the name keeps nothing. Here the value behind the name has a
derivative that is JAX's own, operation for operation, but reads the named result.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.custom_derivatives import SymbolicZero
from jax.extend import core

from . import jaxprs


def is_result_in_derivative(equation: Any) -> bool:
    """Whether the derivative of an equation takes the equation's own result, which a name behind it would miss."""
    if next(jaxprs.find_subjaxprs(equation), None) is not None:
        return False  # what defines its own derivative, or holds others
    avals = tuple(atom.aval for atom in equation.invars)
    if not all(map(jaxprs.is_array, avals)) or not all(_is_float(var.aval) for var in equation.outvars):
        return False
    if any(map(jaxprs.is_placed, avals)):
        return False  # types with axes of a mesh: constants in a derivative would have to be of the same
    question = _EquationKey(equation)
    try:
        return _is_result_read_cached(question)
    except TypeError:  # parameters that cannot be hashed
        return _is_result_read(question)


class _EquationKey:
    """An equation as a key: equal where primitive, parameters and types are."""

    def __init__(self, equation: Any) -> None:
        self.call = _make_callable(equation)
        self.shapes = tuple(_make_shape_struct(atom) for atom in equation.invars)
        types = tuple((like.shape, like.dtype, like.weak_type) for like in self.shapes)
        self.parts = (equation.primitive, tuple(sorted(equation.params.items(), key=lambda item: item[0])), types)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _EquationKey) and self.parts == other.parts

    def __hash__(self) -> int:
        return hash(self.parts)


@functools.lru_cache(maxsize=4096)
def _is_result_read_cached(key: _EquationKey) -> bool:
    return _is_result_read(key)


def _is_result_read(key: _EquationKey) -> bool:
    given = key.shapes
    moving = [number for number, like in enumerate(given) if jax.numpy.issubdtype(like.dtype, jax.numpy.inexact)]
    if not moving:
        return False
    try:
        program, count = _trace_derivative(key.call, given, moving, [given[number] for number in moving])
    except (NameError, NotImplementedError, TypeError, ValueError):
        # No derivative, or one that is only known where the equation runs (collectives over named axes): these are
        # linear, or nobody differentiates them.
        return False
    inner = jaxprs.open_jaxpr(program)
    results = set(jaxprs.collect_variables(inner.outvars[:count]))
    if len(results) < count:
        return False  # a constant, as the product over nothing
    if any(results.intersection(one.outvars) and not results.issuperset(one.outvars) for one in inner.eqns):
        return False  # made together with more that the derivative reads, as the values of an svd with its vectors
    return any(atom in results for equation in inner.eqns for atom in jaxprs.collect_variables(equation.invars))


def name_with_derivative(equation: Any, name: str) -> list[Any]:
    """The equation, a `checkpoint_name` behind it, and its derivative from the named result."""
    call = _make_callable(equation)
    count, kept = len(equation.invars), len(equation.outvars)

    @jax.custom_jvp
    def return_results(*leaves: Any) -> list[Any]:
        return list(leaves[count:])

    def compute_jvp(leaves: Sequence[Any], tangents: Sequence[Any]) -> tuple[list[Any], list[Any]]:
        given, named = leaves[:count], leaves[count:]
        moving = [number for number in range(count) if not isinstance(tangents[number], SymbolicZero)]
        moved = [tangents[number] for number in moving]
        if not moving:
            return list(named), [jax.numpy.zeros_like(result) for result in named]
        program = _trace_derivative(call, given, moving, moved)[0]
        inner = jaxprs.open_jaxpr(program)
        made, rest = inner.outvars[:kept], inner.outvars[kept:]
        later = [one for one in inner.eqns if not set(one.outvars).intersection(made)]
        alone = inner.replace(eqns=later, invars=[*inner.invars, *made], outvars=rest)
        alone = alone if program is inner else program.replace(jaxpr=alone)
        return list(named), jaxprs.run(alone, [*given, *moved, *named])

    return_results.defjvp(compute_jvp, symbolic_zeros=True)
    fresh = [core.Var(var.aval) for var in equation.outvars]
    named = jaxprs.add_checkpoint_name(equation, name, fresh)
    template = jaxprs.open_jaxpr(
        jax.make_jaxpr(return_results)(*map(_make_shape_struct, [*equation.invars, *equation.outvars]))
    )
    last = template.eqns[0].replace(
        invars=[*equation.invars, *fresh],
        outvars=equation.outvars,
        source_info=equation.source_info,
        ctx=equation.ctx,
    )
    return [*named, last]


def _trace_derivative(
    call: Callable[..., list[Any]], primals: Sequence[Any], indices: Sequence[int], input_tangents: Sequence[Any]
) -> tuple[Any, int]:
    """The program that makes results and tangents of the arguments and the tangents of some, and how many results."""
    counts: list[int] = []

    def run_jvp(*leaves: Any) -> Any:
        arguments = list(leaves[: len(primals)])

        def run_primal(*chosen: Any) -> list[Any]:
            full = list(arguments)
            for number, value in zip(indices, chosen, strict=True):
                full[number] = value
            return call(*full)

        results, tangents = jax.jvp(run_primal, [arguments[number] for number in indices], list(leaves[len(primals) :]))
        counts.append(len(results))
        return [*results, *tangents]

    program = jax.make_jaxpr(run_jvp)(*primals, *input_tangents)
    return program, counts[0]


def _make_callable(equation: Any) -> Callable[..., list[Any]]:
    """What an equation computes, as a function."""

    def call(*operands: Any) -> list[Any]:
        found = equation.primitive.bind(*operands, **equation.params)
        return list(found) if equation.primitive.multiple_results else [found]

    return call


def _make_shape_struct(atom: Any) -> jax.ShapeDtypeStruct:
    aval = atom.aval
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype, weak_type=bool(aval.weak_type))


def _is_float(aval: Any) -> bool:
    return jaxprs.is_array(aval) and bool(jax.numpy.issubdtype(aval.dtype, jax.numpy.inexact))
