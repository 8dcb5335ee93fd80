# SPDX-License-Identifier: Apache-2.0
"""All rules by the name of the primitive, and the factors of an equation.

A primitive without a rule has no factors: what is not known is needed whole.
"""

from typing import Any

from jax.extend import core

from .factor import Axis, Factor
from .primitives import contractions, elementwise, indexing, random, reductions, shapes
from .rule import Rule

RULES: dict[str, Rule] = {
    **contractions.RULES,
    **elementwise.RULES,
    **indexing.RULES,
    **random.RULES,
    **reductions.RULES,
    **shapes.RULES,
}


def find_factors(equation: Any) -> tuple[Factor, ...]:
    """Return the axes along which an equation can be cut.

    Args:
        equation: An equation of a jaxpr.

    Returns:
        A factor for each axis, none for an axis that is shorter than two or that is sharded under an explicit mesh. An
        equation with effects and one of a primitive without a rule have no factors.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> program = jax.make_jaxpr(jnp.dot)(jnp.ones((4, 8)), jnp.ones((8, 2)))
        >>> for factor in find_factors(program.eqns[0]):
        ...     print(factor.operands, factor.results, factor.kind)
        (0, None) (0,) map
        (None, 1) (1,) map
        (1, 0) (None,) sum
    """
    rule = RULES.get(equation.primitive.name)
    if equation.effects or rule is None:
        return ()
    return tuple(factor for factor in rule.find(equation) if _is_possible(equation, factor))


def _is_possible(equation: Any, factor: Factor) -> bool:
    atoms = (*equation.invars, *equation.outvars)
    lengths = []
    for atom, axis in zip(atoms, (*factor.operands, *factor.results), strict=True):
        if axis is None:
            continue
        if isinstance(atom, core.Literal) or _is_sharded(atom.aval, axis):
            return False
        lengths.append(atom.aval.shape[axis])
    return min(lengths) > 1


def _is_sharded(aval: Any, axis: Axis) -> bool:
    spec = tuple(getattr(getattr(aval, "sharding", None), "spec", ()))
    return bool(axis is not None and axis < len(spec) and spec[axis] is not None)
