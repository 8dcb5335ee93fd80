# SPDX-License-Identifier: Apache-2.0
"""The forward rule of a `jax.custom_vjp`: what runs instead of the function where a gradient is taken.

Sits on `jaxprs`; `transform.naming.names` reads and rewrites forward rules. The program of a custom_vjp holds the
function, which nobody differentiates, and a thunk that traces the forward rule for the arguments that are
differentiated. Under a gradient the operations of the rule become operations of the region around them, so a policy
saves them like any others: the residuals of flash attention kernels have their `checkpoint_name`s there.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.extend import core, linear_util

from . import jaxprs

# Place of a forward rule among the parameters of an equation, like those of `jaxprs.find_subjaxprs`.
FORWARD_RULE: jaxprs.Place = ("fwd_jaxpr_thunk", -1)


def has_forward_rule(equation: Any) -> bool:
    """Return whether an equation is a custom_vjp."""
    return FORWARD_RULE[0] in equation.params


def trace_forward_rule(equation: Any) -> Any:
    """Return the forward rule of a custom_vjp; None for other equations, or if nothing can be differentiated.

    The rule is traced with all floating-point arguments differentiated. JAX keeps the trace and uses it again.

    Args:
        equation: Any equation.

    Returns:
        An open jaxpr: its arguments are those of the equation without its constants, its results the residuals that are
        computed, and then the results of the equation.
    """
    if not has_forward_rule(equation):
        return None
    operands = equation.invars[equation.params.get("num_consts", 0) :]
    is_differentiated = [
        jax.numpy.issubdtype(getattr(atom.aval, "dtype", bool), jax.numpy.inexact) for atom in operands
    ]
    if not any(is_differentiated):
        return None
    try:
        return _call_thunk(equation.params[FORWARD_RULE[0]], is_differentiated)[0]
    except Exception:  # a user's function that fails only if it is differentiated, which it may never be
        return None


def replace_forward_rule(equation: Any, transform: Callable[[Any], Any]) -> Any:
    """Return a custom_vjp with another forward rule.

    Args:
        equation: An equation with a forward rule.
        transform: Returns for the open jaxpr of the forward rule another one with the same arguments and results.
    """
    thunk = equation.params[FORWARD_RULE[0]]
    traced: dict[tuple[bool, ...], tuple[Any, Any]] = {}

    def trace_new_rule(*is_differentiated: bool) -> tuple[Any, Any]:
        if is_differentiated not in traced:
            rule, consts = _call_thunk(thunk, is_differentiated)
            traced[is_differentiated] = transform(rule), consts
        return traced[is_differentiated]

    new: Any = trace_new_rule
    if hasattr(thunk, "call_wrapped"):
        new = linear_util.wrap_init(trace_new_rule, debug_info=thunk.debug_info)
    return equation.replace(params={**equation.params, FORWARD_RULE[0]: new})


def name_results(rule: Any, marks: Mapping[int, str], count: int) -> tuple[Any, frozenset[int]]:
    """Return a forward rule whose results have names, so that residuals that are results too have them as well.

    A name behind the custom_vjp would name a copy: the backward pass reads the residual, and the rule would run again.

    Args:
        rule: The open jaxpr of a forward rule.
        marks: Names by the number of the result.
        count: How many results the custom_vjp has; in the rule they follow the residuals.

    Returns:
        The rule, and the numbers of the results that it names; not those that are arguments or constants.
    """
    computed = {var: equation for equation in rule.eqns for var in equation.outvars}
    first = len(rule.outvars) - count
    renamed: dict[Any, Any] = {}
    equations, named = list(rule.eqns), set()
    for number, mark in marks.items():
        var = rule.outvars[first + number]
        if not isinstance(var, core.Var) or var not in computed or not jaxprs.is_array(var.aval):
            continue
        named.add(number)
        if var not in renamed:
            renamed[var] = core.Var(var.aval)
            equations += jaxprs.make_name_equations(var, renamed[var], mark, computed[var])
    outvars = [renamed.get(atom, atom) if isinstance(atom, core.Var) else atom for atom in rule.outvars]
    return jaxprs.replace_equations(rule, equations, outvars) if renamed else rule, frozenset(named)


def _call_thunk(thunk: Any, is_differentiated: Any) -> tuple[Any, Any]:
    rule, consts = getattr(thunk, "call_wrapped", thunk)(*is_differentiated)
    return rule, consts
