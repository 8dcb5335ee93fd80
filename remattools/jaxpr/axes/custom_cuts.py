# SPDX-License-Identifier: Apache-2.0
"""Functions with derivatives of their own, cut through their own rules: `jax.custom_jvp` and `jax.custom_vjp`.

A piece is again such a function, of the rows of a piece, whose rules are pieces of the traced rules. An axis is a
factor only if it goes through the function and through each of its rules. For a custom_vjp that means that the backward
rule computes rows of gradients for operands that are cut, and sums over the rows for operands that are whole.

The rules are traced for whole operands: a rule may check shapes or divide by a number of rows. Many rules call their
own function, for gradients of gradients: there the axis is a factor if it goes through the function, because whether
it goes through its rule is what is being found out.
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from ... import compat
from .factor import Axis, Factor
from .programs import Cut, FindFactors, Program, find_cut, flatten_program

PRIMITIVES = frozenset({"custom_jvp_call", "custom_vjp_call"})


@dataclasses.dataclass(frozen=True)
class Step:
    """A program and how it is cut."""

    program: Program
    cut: Cut


@dataclasses.dataclass(frozen=True)
class Pushforward:
    """The rule of a custom_jvp.

    Attributes:
        step: A program of the operands and the tangents of the floating-point ones.
        is_zero: For each result, whether its tangent is missing, because it is zero.
    """

    step: Step
    is_zero: tuple[bool, ...]


@dataclasses.dataclass(frozen=True)
class Pullback:
    """The rules of a custom_vjp.

    Attributes:
        forward: The forward rule; its results are the residuals that it computes, and then those of the function.
        backward: The backward rule, of all residuals and the results' cotangents.
        residuals: For each residual the number of the operand that it is, or None if the forward rule computes it.
        has_cotangent: For each operand, whether the backward rule returns a cotangent.
    """

    forward: Step
    backward: Step
    residuals: tuple[int | None, ...]
    has_cotangent: tuple[bool, ...]


@dataclasses.dataclass(frozen=True)
class Analysis:
    """The function and its rules, cut along one factor."""

    step: Step
    rule: Pushforward | Pullback


def find_custom_cuts(equation: Any, find_factors: FindFactors) -> Mapping[Factor, Analysis]:
    """Return the factors of a custom_jvp or custom_vjp, each with how the function and its rules are cut.

    Args:
        equation: An equation of one of `PRIMITIVES`.
        find_factors: Returns the factors of the equations inside.
    """
    return _analyse(equation, _Search(find_factors))


def is_inexact(aval: Any) -> bool:
    """Return whether values of a type have a tangent: they are floating-point or complex."""
    return bool(jnp.issubdtype(aval.dtype, jnp.inexact))


@dataclasses.dataclass(frozen=True)
class _Search:
    """Finds factors inside a function or inside one of its rules.

    Attributes:
        find_factors: Returns the factors of an equation.
        assumed: Functions whose rules are being cut.
    """

    find_factors: FindFactors
    assumed: frozenset[Any] = frozenset()

    def __call__(self, equation: Any) -> Sequence[Factor]:
        """Return the factors of an equation, and of a function that is being cut those of itself without its rule."""
        if equation.primitive.name not in PRIMITIVES or equation.effects:
            return self.find_factors(equation)
        if _identify(equation) in self.assumed:
            return [factor for factor, _ in _find_cuts(flatten_program(equation.params["call_jaxpr"]), self)]
        return tuple(_analyse(equation, self))

    def assume(self, equation: Any) -> "_Search":
        """Return the search inside the rules of a function."""
        return dataclasses.replace(self, assumed=self.assumed | {_identify(equation)})


def _identify(equation: Any) -> tuple[Any, ...]:
    """Return what the calls of one function have in common: each trace of a rule has programs of its own."""
    params = equation.params
    rule = params.get("jvp_jaxpr_fun", params.get("fwd_jaxpr_thunk"))
    sources = [
        getattr(getattr(each, "debug_info", None), "func_src_info", None) for each in (params["call_jaxpr"], rule)
    ]
    return (equation.primitive.name, *sources, *(str(atom.aval) for atom in equation.invars))


def _analyse(equation: Any, search: _Search) -> Mapping[Factor, Analysis]:
    params = equation.params
    # A constant of a closure has no derivative, and symbolic zeros choose between rules at the time of a gradient.
    if params["num_consts"] or params["symbolic_zeros"]:
        return {}
    inside = search.assume(equation)
    with compat.enter_equation(equation):
        if equation.primitive.name == "custom_jvp_call":
            return _analyse_jvp(params["call_jaxpr"], params["jvp_jaxpr_fun"], inside)
        rules = (params["fwd_jaxpr_thunk"], params["bwd"], params["out_trees"])
        return _analyse_vjp(params["call_jaxpr"], *rules, inside)


# The rules of a function are traced once: the same jaxpr is found in each block and looked at again for each piece.
@functools.lru_cache(maxsize=256)
def _analyse_jvp(call: Any, thunk: Any, search: _Search) -> Mapping[Factor, Analysis]:
    program = flatten_program(call)
    cuts = list(_find_cuts(program, search))
    if not cuts:
        return {}
    is_differentiable = [is_inexact(var.aval) for var in program.inputs]
    try:
        jaxpr, consts, zeros = _call_thunk(thunk, *(not use for use in is_differentiable))
    except Exception:  # a user's rule that fails only where it is used, which it may never be
        return {}
    pushing = flatten_program(jaxpr, consts)
    if _has_tracers(pushing):
        return {}
    found = {}
    for factor, cut in cuts:
        dots = [axis for axis, use in zip(factor.operands, is_differentiable, strict=True) if use]
        results = [axis for axis, is_zero in zip(factor.results, zeros, strict=True) if not is_zero]
        step = _cut_rule(pushing, [*factor.operands, *dots], [*factor.results, *results], search)
        if step is not None:
            found[factor] = Analysis(Step(program, cut), Pushforward(step, tuple(zeros)))
    return found


@functools.lru_cache(maxsize=256)
def _analyse_vjp(call: Any, thunk: Any, bwd: Any, out_trees: Any, search: _Search) -> Mapping[Factor, Analysis]:
    program = flatten_program(call)
    cuts = list(_find_cuts(program, search))
    operands = [var.aval for var in program.inputs]
    if not cuts or not all(is_inexact(atom.aval) for atom in program.outputs):
        return {}
    try:
        jaxpr, consts = _call_thunk(thunk, *map(is_inexact, operands))
        forward = flatten_program(jaxpr, consts)
        residuals = tuple(out_trees()[2])
        computed = iter(forward.outputs)
        saved = [next(computed).aval if number is None else operands[number] for number in residuals]
        backward, has_cotangent = _trace_backward(bwd, saved, [atom.aval for atom in program.outputs], operands)
    except Exception:  # a user's rule that fails only where it is used, which it may never be
        return {}
    if _has_tracers(forward) or _has_tracers(backward):
        return {}
    found = {}
    for factor, cut in cuts:
        rule = _cut_pullback(factor, forward, backward, residuals, has_cotangent, search)
        if rule is not None:
            found[factor] = Analysis(Step(program, cut), rule)
    return found


def _call_thunk(thunk: Any, *flags: bool) -> Any:
    return getattr(thunk, "call_wrapped", thunk)(*flags)


def _trace_backward(
    bwd: Any, residuals: Sequence[Any], results: Sequence[Any], operands: Sequence[Any]
) -> tuple[Program, tuple[bool, ...]]:
    """Return the backward rule as a program of the cotangents that it computes, and which operands have one."""
    has_cotangent: list[bool] = []

    def pull_back(*values: Any) -> list[Any]:
        cotangents, _ = bwd.call_wrapped(*values)
        is_zero = [hasattr(each, "aval") and not isinstance(each, jax.Array) for each in cotangents]
        has_cotangent[:] = [is_inexact(aval) and not zero for aval, zero in zip(operands, is_zero, strict=True)]
        return [each for each, has in zip(cotangents, has_cotangent, strict=True) if has]

    avals = [compat.make_abstract(aval) for aval in (*residuals, *results)]
    return flatten_program(jax.make_jaxpr(pull_back)(*avals)), tuple(has_cotangent)


def _find_cuts(program: Program, find_factors: FindFactors) -> Iterator[tuple[Factor, Cut]]:
    """Yield the factors of a program: the axis goes from its first result to all others and to its inputs."""
    first = program.outputs[0]
    shape = first.aval.shape if isinstance(first, core.Var) else ()  # type: ignore[attr-defined]
    for axis, length in enumerate(shape):
        cut = find_cut(program, {first: axis}, find_factors) if length > 1 else None
        places = [] if cut is None else [cut.get_place(atom) for atom in program.outputs]
        if cut is not None and all(isinstance(place, int) for place in places):
            operands = tuple(_get_axis(cut, var) for var in program.inputs)
            yield Factor(operands, tuple(_get_axis(cut, atom) for atom in program.outputs)), cut


def _get_axis(cut: Cut, atom: Any) -> Axis:
    place = cut.get_place(atom)
    assert place != "sum"
    return place


def _cut_pullback(
    factor: Factor,
    forward: Program,
    backward: Program,
    residuals: Sequence[int | None],
    has_cotangent: Sequence[bool],
    find_factors: FindFactors,
) -> Pullback | None:
    num_computed = len(forward.outputs) - len(factor.results)
    first = _cut_rule(forward, factor.operands, [None] * num_computed + list(factor.results), find_factors)
    if first is None:
        return None
    computed = iter(first.cut.get_place(atom) for atom in forward.outputs)
    saved = [next(computed) if number is None else factor.operands[number] for number in residuals]
    axes = [place for place in saved if place != "sum"]
    cotangents = [axis for axis, has in zip(factor.operands, has_cotangent, strict=True) if has]
    if len(axes) != len(saved):
        return None
    second = _cut_rule(backward, [*axes, *factor.results], cotangents, find_factors)
    if second is None:
        return None
    # Pieces add what they return for an operand that is whole, so that has to be a part of a sum or zero.
    for atom, axis in zip(backward.outputs, cotangents, strict=True):
        if axis is None and second.cut.get_place(atom) != "sum" and not _is_zero(backward, atom):
            return None
    return Pullback(first, second, tuple(residuals), tuple(has_cotangent))


def _cut_rule(
    program: Program, inputs: Sequence[Axis], outputs: Sequence[Axis], find_factors: FindFactors
) -> Step | None:
    """Return a rule cut where its inputs and outputs are; None if that is impossible.

    Args:
        program: The rule.
        inputs: Position of the axis in each input; None for those that have to be whole.
        outputs: Position of the axis in each output; None for those that may be anything.
        find_factors: Returns the factors of the equations inside.
    """
    seeds: dict[Any, int] = {}
    wanted = [*zip(program.inputs, inputs, strict=True), *zip(program.outputs, outputs, strict=True)]
    for atom, axis in wanted:
        if axis is None:
            continue
        if not isinstance(atom, core.Var) or seeds.setdefault(atom, axis) != axis:
            return None
    cut = find_cut(program, seeds, find_factors)
    if cut is None or any(cut.get_place(var) != axis for var, axis in zip(program.inputs, inputs, strict=True)):
        return None
    if any(axis not in (None, cut.get_place(atom)) for atom, axis in zip(program.outputs, outputs, strict=True)):
        return None
    return Step(program, cut)


def _is_zero(program: Program, atom: Any) -> bool:
    """Return whether a value is zero by its definition, as `jnp.zeros_like` returns it."""
    if isinstance(atom, core.Literal):
        return bool(np.all(np.asarray(atom.val) == 0))
    equation = next((each for each in program.equations if atom in each.outvars), None)
    if equation is None or equation.primitive.name not in ("broadcast_in_dim", "convert_element_type"):
        return False
    return _is_zero(program, equation.invars[0])


def _has_tracers(program: Program) -> bool:
    return any(isinstance(value, jax.core.Tracer) for value in program.consts.values())
