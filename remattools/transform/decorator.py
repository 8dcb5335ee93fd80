# SPDX-License-Identifier: Apache-2.0
"""`@remat`: regions for code that may be edited.

Sits on `region` and `apply`. The only place that changes a user's class: the user
asked for it in the line above the class.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any, Literal, Protocol, overload

from flax import nnx

from ..errors import RuleError
from ..rules.policies import PolicyLike
from ..rules.rule import Names, Remat
from . import region, swap
from .apply import apply, coerce_rules, find_outermost_sequences
from .functions import FunctionTarget


class Decorator(Protocol):
    """What `remat(...)` with options returns: takes a class or function and keeps its type."""

    def __call__[T: Callable[..., Any]](self, target: T, /) -> T:
        """Decorate `target`."""
        ...


# One TypeVar for classes, methods and functions: parameter names, generics and overloads of `target` survive.
@overload
def remat[T: Callable[..., Any]](
    target: T,
    /,
    *,
    policy: PolicyLike | None = None,
    save: Names = (),
    offload: Names = (),
    every_n: int = 1,
    offset: int = 0,
    group: int | Literal["sqrt"] = 1,
    nested: bool = False,
    methods: Names = ("__call__",),
    prevent_cse: bool = True,
    rules: Any = None,
) -> T: ...
@overload
def remat(
    target: None = None,
    /,
    *,
    policy: PolicyLike | None = None,
    save: Names = (),
    offload: Names = (),
    every_n: int = 1,
    offset: int = 0,
    group: int | Literal["sqrt"] = 1,
    nested: bool = False,
    methods: Names = ("__call__",),
    prevent_cse: bool = True,
    rules: Any = None,
) -> Decorator: ...
def remat(
    target: Any = None,
    /,
    *,
    policy: PolicyLike | None = None,
    save: Names = (),
    offload: Names = (),
    every_n: int = 1,
    offset: int = 0,
    group: int | Literal["sqrt"] = 1,
    nested: bool = False,
    methods: Names = ("__call__",),
    prevent_cse: bool = True,
    rules: Any = None,
) -> Any:
    """Rematerialise a class, a method or a function, with or without parentheses.

    On an nnx class, the named `methods` of every instance become regions. With
    `every_n`, `group` or `rules` the class is a model: when an instance is built,
    the modules of its sequences, or those that the rules match, become regions.
    On a method or a function of arrays and nnx objects, every call is a region.

    Args:
        target: The class, method or function to decorate.
        policy: Name of a policy, a `Policy` or a JAX policy callable; None saves nothing.
        save: Patterns of the values to save on the device: "attn.qkv" (a submodule's
            output), "mlp:dot_general" (an operation in it), "@name" (a `checkpoint_name`).
        offload: Patterns of the values to save in host memory.
        every_n: Take every n-th module of each sequence; an int, at least 1.
        offset: Index of the first module taken, below `every_n`.
        group: How many consecutive modules share one region, or "sqrt" to choose the number.
        nested: Make each module of a group a region inside the group's region, too.
        methods: Methods that become regions; classes only.
        prevent_cse: Keep the compiler from merging the recomputation with the first
            computation, as in `jax.checkpoint`; False only inside a scan.
        rules: Rules for the instances of a model class, in any form that `apply` takes;
            replaces all other options.

    Returns:
        The class itself, or a function with the signature and docstring of `target`; without
        a target, the decorator. Type checkers see the type of what is decorated.

    Raises:
        RuleError: If `target` is not a function or an nnx class, lacks one of the `methods`, or is
            a function with options for classes.
        PolicyError: If `policy` names none of the policies.

    Example:
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
        nested=nested,
        methods=methods,
        prevent_cse=prevent_cse,
    )

    def decorate(decorated: Any) -> Any:
        if inspect.isclass(decorated):
            return _decorate_class(decorated, action, rules)
        if rules is not None or action.every_n != 1 or action.group != 1:
            raise RuleError(
                what=f"@remat on the function {decorated!r} has rules, every_n or group.",
                why="they choose among the modules of a model; a function is one region.",
                fix="decorate the model's class with them, or use remattools.apply(model, rules).",
            )
        return _decorate_function(decorated, action)

    if target is None:
        return decorate
    if not callable(target):
        raise RuleError(
            what=f"remat() received {target!r}, which is neither a class nor a function.",
            why="the only positional argument is what to decorate; options are keywords.",
            fix="@remat(policy=...) above a class, a method or a function.",
        )
    return decorate(target)


def _decorate_function(function: Callable[..., Any], action: Remat) -> Callable[..., Any]:
    target = FunctionTarget(function)

    @functools.wraps(function)
    def call_as_region(*args: Any, **kwargs: Any) -> Any:
        return region.call(target, action, args, kwargs)

    return call_as_region


def _decorate_class(cls: type, action: Remat, rules: Any) -> type:
    if not issubclass(cls, nnx.Module):
        raise RuleError(
            what=f"@remat decorates the class {cls.__qualname__}, which is not an nnx.Module.",
            why="its instances could not be split into arrays and static structure.",
            fix=f"class {cls.__qualname__}(nnx.Module), or decorate its methods.",
        )
    if rules is None and action.every_n == 1 and action.group == 1:
        swap.check_class(cls, action)
        for name in action.methods:
            setattr(cls, name, _decorate_function(getattr(cls, name), action))
        return cls
    _apply_when_built(cls, action if rules is None else coerce_rules(rules, None))
    return cls


def _apply_when_built(cls: type, rules: Any) -> None:
    original = vars(cls).get("__init__") or getattr(cls, "__init__")  # noqa: B009  # mypy knows no __init__ of a class

    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        # In a subclass this runs inside super().__init__(): modules that it adds afterwards get no action.
        apply(self, rules if not isinstance(rules, Remat) else _make_sequence_rules(self, rules))

    cls.__init__ = __init__  # type: ignore[misc]


def _make_sequence_rules(model: Any, action: Remat) -> dict[str, Remat]:
    """One rule for each outermost sequence of modules in `model`."""
    sequences = find_outermost_sequences(model)
    if not sequences:
        raise RuleError(
            what=f"{type(model).__qualname__} holds no sequence of modules for every_n={action.every_n}, "
            f"group={action.group!r}.",
            why="every_n and group count along a list of modules; no module would become a region.",
            fix='put the blocks into an nnx.List, or use @remat(rules={"pattern": ...}).',
        )
    return dict.fromkeys(sequences, action)
