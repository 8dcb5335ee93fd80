# SPDX-License-Identifier: Apache-2.0
"""`@remat`: the same regions for code that may be edited.

Sits on `region` and `apply`. Decorating is the one case where a class of the user
changes: by the user's own line above it.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

from flax import nnx

from ..errors import RuleError
from ..rules.rule import Remat
from . import apply as application
from . import region, swap

# Attribute of a decorated function that holds its action, so that `explain` can see it.
ACTION_ATTRIBUTE = "__remattools_action__"


class _FunctionTarget:
    """Target of a decorated function; two decorations of one function are one."""

    __slots__ = ("function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _FunctionTarget) and self.function is other.function

    def __hash__(self) -> int:
        return hash(self.function)


def remat(
    target: Any = None,
    /,
    *,
    policy: Any = None,
    save: tuple[str, ...] = (),
    offload: tuple[str, ...] = (),
    every_n: int = 1,
    offset: int = 0,
    group: Any = 1,
    methods: tuple[str, ...] = ("__call__",),
    prevent_cse: bool = True,
    rules: Any = None,
) -> Any:
    """Rematerialise a class, a method or a function; usable with and without parentheses.

    On an nnx class the named `methods` of all instances become regions. With
    `every_n`, `group` or `rules` the class is a model: the sequences of modules in
    each instance, or whatever the rules match, become regions when it is built. On
    a method or a function that takes arrays or nnx objects, its calls do.

    Args:
        target: What to decorate.
        policy: Name of a policy, a `Policy`, or a JAX policy callable; None saves nothing.
        save: Name patterns of values to keep on the device, as in `Remat`.
        offload: Name patterns of values to keep in host memory.
        every_n: Take every n-th module of each sequence.
        offset: The first one taken.
        group: How many consecutive modules share one region.
        methods: Methods that become regions; classes only.
        prevent_cse: As in `jax.checkpoint`.
        rules: Rules for the instances of a model class, instead of an action.

    Returns:
        The class itself, or a function with the signature and docstring of `target`.

    Raises:
        RuleError: If options are combined that contradict each other.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> import remattools as rt
        >>> @rt.remat(policy="dots_saveable")
        ... def f(x):
        ...     return jnp.sin(jnp.cos(x))
        >>> round(float(jax.grad(f)(1.0)), 4)
        -0.7216
    """
    action = Remat(
        policy=policy,
        save=save,
        offload=offload,
        every_n=every_n,
        offset=offset,
        group=group,
        methods=methods,
        prevent_cse=prevent_cse,
    )

    def decorate(decorated: Any) -> Any:
        if inspect.isclass(decorated):
            return _decorate_class(decorated, action, rules)
        if rules is not None or action.every_n != 1 or action.group != 1:
            raise RuleError(
                what=f"{decorated!r} is a function, and was given rules, every_n or group.",
                why="these choose among the modules of a model; a function is one region.",
                fix="put them on the model's class, or use remattools.apply(model, rules).",
            )
        return _decorate_function(decorated, action)

    if target is None:
        return decorate
    if not callable(target):
        raise RuleError(
            what=f"remat() was given {target!r}, which is no class and no function.",
            why="options are keywords, so that none is taken for what to decorate.",
            fix="@remat(policy=...) above a class, a method or a function.",
        )
    return decorate(target)


def _decorate_function(function: Callable[..., Any], action: Remat) -> Callable[..., Any]:
    target = _FunctionTarget(function)

    @functools.wraps(function)
    def call_as_region(*args: Any, **kwargs: Any) -> Any:
        return region.call(target, action, args, kwargs)

    setattr(call_as_region, ACTION_ATTRIBUTE, action)
    return call_as_region


def _decorate_class(cls: type, action: Remat, rules: Any) -> type:
    if not issubclass(cls, nnx.Module):
        raise RuleError(
            what=f"@remat stands above {cls.__qualname__}, which is no nnx.Module.",
            why="only nnx modules can be taken apart into arrays and structure.",
            fix="derive it from nnx.Module, or decorate its method.",
        )
    if rules is None and action.every_n == 1 and action.group == 1:
        swap.check_class(cls, action)
        for name in action.methods:
            setattr(cls, name, _decorate_function(getattr(cls, name), action))
        return cls
    _apply_when_built(cls, action if rules is None else application.coerce_rules(rules, None))
    return cls


def _apply_when_built(cls: type, rules: Any) -> None:
    original = vars(cls).get("__init__") or getattr(cls, "__init__")  # noqa: B009  # mypy knows no __init__ of a class

    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        # A subclass goes on building after this; its own __init__ applies nothing it does not have yet.
        application.apply(self, rules if not isinstance(rules, Remat) else _make_sequence_rules(self, rules))

    cls.__init__ = __init__  # type: ignore[misc]


def _make_sequence_rules(model: Any, action: Remat) -> dict[str, Remat]:
    """One rule for each outermost sequence of modules in `model`."""
    sequences = application.find_outermost_sequences(model)
    if not sequences:
        raise RuleError(
            what=f"{type(model).__qualname__} holds no sequence of modules for every_n={action.every_n}.",
            why="every_n and group count along a list of modules.",
            fix='keep the blocks in an nnx.List, or give rules={"pattern": ...}.',
        )
    return dict.fromkeys(sequences, action)
