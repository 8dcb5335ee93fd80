# SPDX-License-Identifier: Apache-2.0
"""Functions under an action: `tile`, the rule "@loss", and what decorators of functions share.

Sits on `region`. `tile` computes the largest values of a loss in pieces, such as the logits between a model and its
scalar. The whole call is traced, so that a stretch may begin inside the model, at the matrix product that
makes the logits; but stretches that lie in modules altogether are the business of rules on these modules.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, Protocol, overload

from ..errors import RuleError
from ..rules.rule import Remat, coerce_action
from ..rules.ruleset import LOSS, Rules
from ..rules.tile import Tile
from . import region


class FunctionTarget:
    """Region target of a decorated function; equal for two decorations of one function, so that they share a trace."""

    __slots__ = ("function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function."""
        return self.function(*args, **kwargs)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, FunctionTarget) and self.function is other.function

    def __hash__(self) -> int:
        return hash(self.function)


# Under this attribute a tiled function keeps its action.
_ACTION = "_remattools_action"


class TileDecorator(Protocol):
    """What `tile(...)` without a function returns: takes a function and keeps its type."""

    def __call__[T: Callable[..., Any]](self, target: T, /) -> T:
        """Decorate `target`."""
        ...


@overload
def tile[T: Callable[..., Any]](
    target: T,
    /,
    *,
    pieces: int | None = None,
    rows: int | None = None,
    axis: int | Literal["batch"] | None = None,
    accumulate: Literal["float32", "float64"] | None = "float32",
    keep_rows: bool = True,
) -> T: ...
@overload
def tile(
    target: None = None,
    /,
    *,
    pieces: int | None = None,
    rows: int | None = None,
    axis: int | Literal["batch"] | None = None,
    accumulate: Literal["float32", "float64"] | None = "float32",
    keep_rows: bool = True,
) -> TileDecorator: ...
def tile(
    target: Any = None,
    /,
    *,
    pieces: int | None = None,
    rows: int | None = None,
    axis: int | Literal["batch"] | None = None,
    accumulate: Literal["float32", "float64"] | None = "float32",
    keep_rows: bool = True,
) -> Any:
    """Compute the largest values of a loss in pieces, with or without parentheses.

    The function's code and the model's stay as they are. Values that lie between the model and the scalar, such as
    logits and their softmax, are computed piece by piece along one axis, and again in the backward pass, so they never
    exist whole. For values inside modules, such as attention scores, put a `Tile` into the rules of these modules.

    Args:
        target: The function to decorate: arrays and nnx objects in, usually a scalar out.
        pieces: Number of pieces, at least 2; 8 if neither `pieces` nor `rows` is given.
        rows: Length of a piece, instead of `pieces`.
        axis: Position of the axis in the shape of the large values; None to choose the one along which most bytes
            vanish; "batch" to compute the whole function in pieces of the batch (gradient accumulation): of all arrays
            outside of nnx objects, or of all arguments but the first if none is passed.
        accumulate: Dtype in which the gradients of weights are added over the pieces; None for their own.
        keep_rows: Keep each row's maximum and sum for the backward pass.

    Returns:
        A function with the signature and docstring of `target`; without a target, the decorator.

    Raises:
        RuleError: If an argument is invalid, or `target` is not a function.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import remattools as rt
        >>> @rt.tile(pieces=4)
        ... def loss(w, x, labels):
        ...     logits = x @ w
        ...     return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=1))
        >>> w, x, labels = jnp.ones((8, 100)), jnp.ones((16, 8)), jnp.arange(16)
        >>> round(float(jax.jit(loss)(w, x, labels)), 3)
        4.605
    """
    action = Tile(pieces, rows=rows, axis=axis, accumulate=accumulate, keep_rows=keep_rows)
    if target is None:
        return functools.partial(apply_to_function, action=action)
    return apply_to_function(target, action=action)


def apply_to_function(function: Any, *, action: Any) -> Any:
    """Return a function that computes its largest values in pieces, or is one region.

    Args:
        function: The function; one that has an action already gets this one instead.
        action: A `Tile`, a `Remat` or a policy.

    Raises:
        RuleError: If `function` is not a function.
    """
    if not callable(function) or isinstance(function, type):
        raise RuleError(
            what=f"tile() received {function!r}, which is not a function.",
            why="what is decorated computes a loss; the only positional argument is that function.",
            fix="@rt.tile(pieces=8) above the function; for a model, rt.apply(model, rules).",
        )
    decided = coerce_action(action)
    function = remove_action(function)
    if decided is False:
        return function
    target = FunctionTarget(function)

    @functools.wraps(function)
    def call_tiled(*args: Any, **kwargs: Any) -> Any:
        return region.call(target, decided, args, kwargs, is_loss=True)

    setattr(call_tiled, _ACTION, decided)
    return call_tiled


def apply_loss_rules(function: Any, rules: Rules) -> Any:
    """Return a function with the action that the last rule for "@loss" gives."""
    return apply_to_function(function, action=[action for pattern, action in rules if pattern.text == LOSS][-1])


def get_function_action(function: Any) -> Remat | None:
    """Return the action that is in force on a function, or None."""
    action: Remat | None = getattr(function, _ACTION, None)
    return action


def remove_action(function: Any) -> Any:
    """Return a function as it was before `tile` or `apply`."""
    return function.__wrapped__ if get_function_action(function) is not None else function
