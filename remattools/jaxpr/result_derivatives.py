# SPDX-License-Identifier: Apache-2.0
"""Operations whose derivative reads their own result: `exp`, `tanh`, `logistic`, `rsqrt`, `reduce_max`.

Sits on `jaxprs`; `transform.naming.names` calls it. A `checkpoint_name` after such an operation names a copy: the
derivative still reads the unnamed result, so the backward pass recomputes it and everything it depends on, and saving
the name saves no work. Here the named value gets a derivative of its own. It has the same operations as JAX's
derivative, but reads the named result.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.custom_derivatives import SymbolicZero
from jax.extend import core

from . import jaxprs


def is_result_in_derivative(equation: Any) -> bool:
    """Return whether the derivative of an equation reads its own result, so that a name after it would be ignored."""
    if next(jaxprs.find_subjaxprs(equation), None) is not None:
        return False  # a custom derivative, or an operation with a nested jaxpr
    avals = tuple(atom.aval for atom in equation.invars)
    if not all(map(jaxprs.is_array, avals)) or not all(_is_float(var.aval) for var in equation.outvars):
        return False
    if any(map(jaxprs.is_placed, avals)):
        return False  # constants in the derivative would need the same mesh axes in their types
    key = _EquationKey(equation)
    try:
        return _is_result_read_cached(key)
    except TypeError:  # unhashable parameters
        return _is_result_read(key)


class _EquationKey:
    """A cache key for an equation; keys are equal if primitive, parameters and operand types are."""

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
    operands = key.shapes
    active = [index for index, like in enumerate(operands) if jax.numpy.issubdtype(like.dtype, jax.numpy.inexact)]
    if not active:
        return False
    try:
        program, count = _trace_derivative(key.call, operands, active, [operands[index] for index in active])
    except (NameError, NotImplementedError, TypeError, ValueError):
        # No derivative, or one that can be traced only where the axis names are bound (collectives): those operations
        # are linear, or never differentiated.
        return False
    inner = jaxprs.open_jaxpr(program)
    results = set(jaxprs.collect_variables(inner.outvars[:count]))
    if len(results) < count:
        return False  # a result is a constant, as in an empty product
    if any(results.intersection(one.outvars) and not results.issuperset(one.outvars) for one in inner.eqns):
        return False  # computed with values that the derivative reads too, such as the vectors of an svd
    return any(atom in results for equation in inner.eqns for atom in jaxprs.collect_variables(equation.invars))


def name_with_derivative(equation: Any, name: str) -> list[Any]:
    """Return the equations that name the results of `equation` and differentiate it through the named results.

    These are the equation itself, a `checkpoint_name` for each result, and an identity whose custom JVP is that of the
    equation.

    Args:
        equation: An equation for which `is_result_in_derivative` is true.
        name: The name.
    """
    call = _make_callable(equation)
    num_operands, num_results = len(equation.invars), len(equation.outvars)

    @jax.custom_jvp
    def return_results(*leaves: Any) -> list[Any]:
        return list(leaves[num_operands:])

    def compute_jvp(leaves: Sequence[Any], tangents: Sequence[Any]) -> tuple[list[Any], list[Any]]:
        operands, named = leaves[:num_operands], leaves[num_operands:]
        active = [index for index in range(num_operands) if not isinstance(tangents[index], SymbolicZero)]
        active_tangents = [tangents[index] for index in active]
        if not active:
            return list(named), [jax.numpy.zeros_like(result) for result in named]
        program = _trace_derivative(call, operands, active, active_tangents)[0]
        inner = jaxprs.open_jaxpr(program)
        results, result_tangents = inner.outvars[:num_results], inner.outvars[num_results:]
        # Without the equations that compute the results: these become arguments, for which the named values are passed.
        remaining = [one for one in inner.eqns if not set(one.outvars).intersection(results)]
        jvp = inner.replace(eqns=remaining, invars=[*inner.invars, *results], outvars=result_tangents)
        jvp = jvp if program is inner else program.replace(jaxpr=jvp)
        return list(named), jaxprs.run(jvp, [*operands, *active_tangents, *named])

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
    """Trace the JVP of `call`.

    Args:
        call: The function to differentiate.
        primals: Its arguments, real or abstract.
        indices: Which of them have a tangent.
        input_tangents: Those tangents.

    Returns:
        A closed jaxpr from primals and tangents to results and their tangents, and the number of results.
    """
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
    """Return a function that computes what an equation computes."""

    def call(*operands: Any) -> list[Any]:
        results = equation.primitive.bind(*operands, **equation.params)
        return list(results) if equation.primitive.multiple_results else [results]

    return call


def _make_shape_struct(atom: Any) -> jax.ShapeDtypeStruct:
    aval = atom.aval
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype, weak_type=bool(aval.weak_type))


def _is_float(aval: Any) -> bool:
    return jaxprs.is_array(aval) and bool(jax.numpy.issubdtype(aval.dtype, jax.numpy.inexact))
