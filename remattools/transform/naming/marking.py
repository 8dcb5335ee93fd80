# SPDX-License-Identifier: Apache-2.0
"""Put names on the values of a traced program that a region saves or offloads.

Sits on `names`, which says where the values are. A `checkpoint_name` follows the operation that computes a value, with
two exceptions, where a name behind it would be that of a copy and save no work: an operation whose derivative reads its
own result, and a custom_vjp, whose backward pass reads what its forward rule computes. There the name is put before the
derivative's reader.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from jax.extend import core

from ... import compat
from ...jaxpr import forward_rules, jaxprs, result_derivatives
from ...rules.policy_types import Decision, Policy
from ...rules.rule import Remat
from . import names, scopes

# `names.SAVED` or `names.OFFLOADED` by the position of an equation.
Marks = dict[names.Position, str]
_KEPT = (names.SAVED, names.OFFLOADED)
_RULE = forward_rules.FORWARD_RULE


def mark_program(
    program: Any,
    action: Remat,
    *,
    holds_tiles: bool = False,
    find_values: Callable[..., Iterable[names.NamedValue]] | None = None,
) -> Any:
    """Return a region's traced program with the values that `action` saves or offloads marked for its policy.

    Args:
        program: The closed jaxpr.
        action: What is saved and offloaded.
        holds_tiles: Whether something inside is computed in pieces.
        find_values: Returns the values that patterns can name, if not those of the program; as in `select_marks`.

    Raises:
        UnmatchedRuleError: If a pattern of `save` or `offload` matches no value that can be saved.
    """
    find_values = find_values or functools.partial(names.find_named_values, program)
    marks = names.select_marks(find_values, action, holds_tiles=holds_tiles)
    if action.policy is not None and names.is_policy_by_names(action, holds_tiles=holds_tiles):
        marks = {**_decide_marks(program, action.policy), **marks}
    return mark_equations(program, marks)


def has_tiles(jaxpr: Any) -> bool:
    """Whether something in a program is computed in pieces."""
    return any(
        jaxprs.get_checkpoint_name(equation) == names.TILE_RESULT or any(has_tiles(below) for _, below in nested)
        for equation in jaxprs.open_jaxpr(jaxpr).eqns
        for nested in [list(jaxprs.find_subjaxprs(equation))]
    )


def mark_equations(jaxpr: Any, marks: Marks, prefix: names.Position = (), *, in_rule: bool = False) -> Any:
    """Return the program with a `checkpoint_name` after every marked equation, and without the marks of `scopes`."""
    equations: list[Any] = []
    same: dict[Any, Any] = {}  # result of a removed mark -> the value it marked
    inner = jaxprs.open_jaxpr(jaxpr)
    placed = _place_marks(inner, marks, prefix, in_rule=in_rule)
    for number, equation in enumerate(inner.eqns):
        if same:
            equation = equation.replace(invars=[_resolve_atom(same, atom) for atom in equation.invars])
        name, mark = jaxprs.get_checkpoint_name(equation), placed.get((number, None))
        equation = _mark_nested(equation, marks, prefix, number, in_rule=in_rule)
        results = {index: each for (other, index), each in placed.items() if other == number and index is not None}
        if results or _has_marks_in_rule(equation, marks, (*prefix, (number, _RULE))):
            equations.extend(_mark_forward_rule(equation, marks, prefix, number, results))
        elif mark in _KEPT and name is None and _is_result_in_derivative(equation, in_rule=in_rule):
            equations.extend(result_derivatives.name_with_derivative(equation, str(mark)))
        elif name is not None and mark is not None:
            equations.extend(jaxprs.replace_checkpoint_name(equation, mark))
        elif name is not None and scopes.is_mark(name):
            same[equation.outvars[0]] = equation.invars[0]
        elif mark is not None:
            equations.extend(jaxprs.add_checkpoint_name(equation, mark))
        else:
            equations.append(equation)
    if all(new is old for new, old in zip(equations, inner.eqns, strict=False)) and len(equations) == len(inner.eqns):
        return jaxpr  # the same object, so that JAX lowers a function called twice only once
    return jaxprs.replace_equations(jaxpr, equations, [_resolve_atom(same, atom) for atom in inner.outvars])


# Number of an equation, and of one of its results; None for all of them.
_Place = tuple[int, int | None]


def _place_marks(inner: Any, marks: Marks, prefix: names.Position, *, in_rule: bool) -> dict[_Place, str]:
    """Marks by equation number in one program, for a custom_vjp by each of its results.

    The mark of a `checkpoint_name` moves to the equation that computes the value, if only there it can be saved.
    """
    found: dict[_Place, str] = {}
    producers: dict[Any, tuple[int, int]] = {}
    for number, equation in enumerate(inner.eqns):
        mark, name = marks.get((*prefix, number)), jaxprs.get_checkpoint_name(equation)
        if name is None:
            producers.update((var, (number, index)) for index, var in enumerate(equation.outvars))
            if mark is not None and _has_rule(equation, in_rule=in_rule):
                found.update(((number, index), mark) for index in range(len(equation.outvars)))
            elif mark is not None:
                found[number, None] = mark
            continue
        producer = producers.get(equation.invars[0]) if isinstance(equation.invars[0], core.Var) else None
        if producer is not None:
            producers[equation.outvars[0]] = producer
        if mark is None:
            continue
        target = _find_place(inner.eqns, producer, in_rule=in_rule) if mark in _KEPT else None
        place = target or (number, None)
        found[place] = names.SAVED if found.get(place) == names.SAVED else mark
    return found


def _find_place(equations: Sequence[Any], producer: tuple[int, int] | None, *, in_rule: bool) -> _Place | None:
    """Where the mark of a `checkpoint_name` moves to, or None if it stays."""
    if producer is None:
        return None
    number, index = producer
    if _has_rule(equations[number], in_rule=in_rule):
        return number, index
    if len(equations[number].outvars) == 1 and _is_result_in_derivative(equations[number], in_rule=in_rule):
        return number, None
    return None


def _has_rule(equation: Any, *, in_rule: bool) -> bool:
    return not in_rule and forward_rules.trace_forward_rule(equation) is not None


def _is_result_in_derivative(equation: Any, *, in_rule: bool) -> bool:
    # The operations of a forward rule have no derivative: the custom_vjp has one.
    return not in_rule and result_derivatives.is_result_in_derivative(equation)


def _has_marks_in_rule(equation: Any, marks: Marks, start: names.Position) -> bool:
    return forward_rules.has_forward_rule(equation) and any(position[: len(start)] == start for position in marks)


def _mark_forward_rule(
    equation: Any, marks: Marks, prefix: names.Position, number: int, results: dict[int, str]
) -> list[Any]:
    """Return the equations of a custom_vjp with marks in its forward rule, and after it where the rule has none."""
    start, count = (*prefix, (number, _RULE)), len(equation.outvars)
    known = forward_rules.trace_forward_rule(equation)
    _, named = forward_rules.name_results(known, results, count)

    def mark_rule(rule: Any) -> Any:
        marked = mark_equations(rule, _transfer_marks(known, rule, marks, start), start, in_rule=True)
        return forward_rules.name_results(marked, results, count)[0]

    equation = forward_rules.replace_forward_rule(equation, mark_rule)
    outer = {index: mark for index, mark in results.items() if index not in named}
    return jaxprs.add_checkpoint_names(equation, outer)


def _transfer_marks(known: Any, rule: Any, marks: Marks, start: names.Position) -> Marks:
    """Return the marks for a forward rule that was traced for other differentiated arguments than the known one."""
    if rule is known:
        return marks
    wanted = {}
    for value in names.find_named_values(known, in_rule=True):
        for position in value.where:
            if (*start, *position) in marks:
                wanted[value.kind, value.path, value.primitive, value.index] = marks[*start, *position]
    return {
        (*start, *position): wanted[key]
        for value in names.find_named_values(rule, in_rule=True)
        if (key := (value.kind, value.path, value.primitive, value.index)) in wanted
        for position in value.where
    }


def _mark_nested(equation: Any, marks: Marks, prefix: names.Position, number: int, *, in_rule: bool) -> Any:
    # Regions in the model's code may hold marks of `scopes`; under jax_remat3 their programs cannot be replaced.
    if jaxprs.is_opaque(equation) or "_prim" in equation.params:
        return equation
    new = {
        place: (below, mark_equations(below, marks, (*prefix, (number, place)), in_rule=in_rule))
        for place, below in jaxprs.find_subjaxprs(equation)
    }
    changed = {place: rewritten for place, (below, rewritten) in new.items() if rewritten is not below}
    return jaxprs.replace_subjaxprs(equation, changed) if changed else equation


def _resolve_atom(same: dict[Any, Any], atom: Any) -> Any:
    return same.get(atom, atom) if isinstance(atom, core.Var) else atom


def _decide_marks(jaxpr: Any, policy: Policy) -> Marks:
    """Marks for a policy that `jax_remat3` would not call."""
    marks = {}
    for position, equation, _, reachable in names.walk_equations(jaxpr, (), (), True):
        name = jaxprs.get_checkpoint_name(equation)
        if not reachable or (name is not None and scopes.is_mark(name)):
            continue
        avals = [atom.aval for atom in equation.invars]
        if name is None:
            verdict = policy.decide(equation.primitive, *avals, **equation.params)
        else:
            verdict = policy.decide(compat.NAME_PRIMITIVE, *avals, name=name)
        if verdict is not Decision.RECOMPUTE:
            marks[position] = names.SAVED if verdict is Decision.SAVE else names.OFFLOADED
    return marks
