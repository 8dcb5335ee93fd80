# SPDX-License-Identifier: Apache-2.0
"""Arrays that a `functools.partial` binds, such as keyword arguments, as arguments of the call.

Imports only `closed_over`. A bound array would otherwise be a constant of the program, and an abstract one could not be
traced at all. Models that a partial binds are left to `closed_over`.
"""

import functools
from typing import Any

import jax
import numpy as np

from . import closed_over


def lift_bound_arrays(fn: Any) -> tuple[Any, dict[str, Any]]:
    """Return a function that takes the arrays bound in a partial as one more argument, and these arrays by name.

    Args:
        fn: The user's function. Only a `functools.partial` that binds arrays, concrete or abstract, is changed.

    Returns:
        The function, whose last argument is the dict, and the dict; `fn` and an empty dict if nothing is bound.
    """
    if not isinstance(fn, functools.partial):
        return fn, {}
    bound = {str(index): value for index, value in enumerate(fn.args)} | fn.keywords
    lifted = {name: value for name, value in bound.items() if _has_arrays(value)}
    if not lifted:
        return fn, {}
    function, kept = fn.func, {name: value for name, value in bound.items() if name not in lifted}
    count = len(fn.args)

    def call(*values: Any) -> Any:
        *args, arrays = values
        all_bound = {**kept, **arrays}
        positional = [all_bound.pop(str(index)) for index in range(count)]
        return function(*positional, *args, **all_bound)

    call.__name__ = str(getattr(function, "__name__", type(function).__name__))
    return call, lifted


def _has_arrays(value: Any) -> bool:
    return not closed_over.has_models(value) and any(
        isinstance(leaf, jax.Array | jax.ShapeDtypeStruct | np.ndarray) for leaf in jax.tree.leaves(value)
    )
