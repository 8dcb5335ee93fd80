# SPDX-License-Identifier: Apache-2.0
"""All rules by the name of the primitive, and the factors of an equation.

A primitive without a rule has no factors: what is not known is needed whole.
"""

from collections.abc import Iterable
from typing import Any

from jax.extend import core

from .custom_cuts import PRIMITIVES, find_custom_cuts
from .factor import Factor
from .primitives import (
    contractions,
    elementwise,
    indexing,
    kernels,
    linear_algebra,
    random,
    reductions,
    shapes,
)
from .rule import Rule

RULES: dict[str, Rule] = {
    **contractions.RULES,
    **elementwise.RULES,
    **indexing.RULES,
    **kernels.RULES,
    **linear_algebra.RULES,
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
    name = equation.primitive.name
    if equation.effects:
        return ()
    if name in PRIMITIVES:
        found: Iterable[Factor] = find_custom_cuts(equation, find_factors)
    else:
        found = RULES[name].find(equation) if name in RULES else ()
    return tuple(factor for factor in found if _is_possible(equation, factor))


def _is_possible(equation: Any, factor: Factor) -> bool:
    atoms = (*equation.invars, *equation.outvars)
    lengths: list[int] = []
    for atom, axis in zip(atoms, (*factor.operands, *factor.results), strict=True):
        if axis is None:
            continue
        if isinstance(atom, core.Literal) or is_sharded(atom.aval, axis):
            return False
        lengths.append(atom.aval.shape[axis])
    return min(lengths) > 1


def is_sharded(aval: Any, axis: int) -> bool:
    """Return whether an explicit mesh divides an axis of a type."""
    spec = tuple(getattr(getattr(aval, "sharding", None), "spec", ()))
    return axis < len(spec) and spec[axis] is not None
