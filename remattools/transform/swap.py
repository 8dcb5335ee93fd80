# SPDX-License-Identifier: Apache-2.0
"""Class swap: recompute activations without editing the model's source.

Sits on `region` (one rematerialised call); knows nothing of patterns, files or budgets. A matched instance gets a
generated subclass of its own class whose methods run as regions; the action is a static attribute of the instance.
Parameter paths, the state tree and `isinstance` do not change.

Facts that shaped this file:

-   Special methods are looked up on the type, so an instance attribute would be ignored. The class is part of nnx's
    graphdef, so a new class on every call would make every jit trace again. So there is one cached subclass for each
    class and set of methods.
-   The action is on the instance, since a class for each action would never be garbage-collected.
-   Both the instance and the class are pickled by their recipe (see `derive`).
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

from flax import nnx

from ..errors import RuleError, suggest_names
from ..rules.rule import Remat
from . import group, region
from .derive import BASE, RECIPE, collect_methods, derive, get_base_class, is_swapped
from .group import Group

# nnx's containers skip attributes of this prefix when they iterate over themselves.
_ACTION = "_pytree__remattools"
_GROUPS = "_pytree__remattools_groups"
_HOLDS_TILES = "_pytree__remattools_holds_tiles"
_METHODS = "_remattools_methods"


def swap(module: Any, action: Remat | None, groups: tuple[Group, ...] = (), *, holds_tiles: bool = False) -> None:
    """Put an action and groups on `module`, in place, in place of those it has.

    Args:
        module: An nnx module.
        action: The methods that it names become regions; None for no action.
        groups: Sequences held by the module whose modules share regions.
        holds_tiles: Whether modules inside it are computed in pieces.

    Raises:
        RuleError: If the module lacks a method that the action names.
    """
    methods: tuple[str, ...] = ()
    if action is not None:
        check_class(type(module), action)
        methods = action.methods
    if groups:
        methods += find_holder_methods(get_base_class(type(module)))
    # Bypasses nnx's __setattr__, which rejects changes from other trace levels and classifies attributes.
    holds_tiles = holds_tiles and action is not None
    for key, value in ((_ACTION, action), (_GROUPS, groups or None), (_HOLDS_TILES, holds_tiles or None)):
        if value is None:
            vars(module).pop(key, None)
        else:
            object.__setattr__(module, key, value)
    cls = _subclass(get_base_class(type(module)), methods) if methods else get_base_class(type(module))
    object.__setattr__(module, "__class__", cls)


def find_holder_methods(cls: type) -> tuple[str, ...]:
    """Return the methods in which a module may run its sequence: `__call__`, or else all public methods."""
    methods = tuple(find_methods(cls))
    return ("__call__",) if "__call__" in methods else methods


def check_class(cls: type, action: Remat) -> None:
    """Raise if an instance of `cls` cannot run under `action`."""
    for name in action.methods:
        _check_method(get_base_class(cls), name)


def unswap(module: Any) -> None:
    """Remove the action and groups of `module`, and give it its own class back."""
    if is_swapped(type(module)):
        object.__setattr__(module, "__class__", get_base_class(type(module)))
    for key in (_ACTION, _GROUPS, _HOLDS_TILES):
        vars(module).pop(key, None)


def get_groups(module: Any) -> tuple[Group, ...]:
    """Return the groups in force on the sequences that `module` holds."""
    groups: tuple[Group, ...] = vars(module).get(_GROUPS, ()) if is_swapped(type(module)) else ()
    return groups


def get_action(module: Any) -> Remat | None:
    """Return the action that is in force on `module`, or None."""
    return vars(module).get(_ACTION) if is_swapped(type(module)) else None


def has_tiles_inside(module: Any) -> bool:
    """Whether modules inside a region's module are computed in pieces."""
    return is_swapped(type(module)) and bool(vars(module).get(_HOLDS_TILES))


_LAZY_FUNCTION_CHECKS = (inspect.isgeneratorfunction, inspect.iscoroutinefunction, inspect.isasyncgenfunction)


# Cached, since a model has thousands of modules and a handful of classes. Errors are not cached.
@functools.lru_cache(maxsize=4096)
def _check_method(cls: type, name: str) -> None:
    if callable(getattr(cls, name, None)) or name in find_methods(cls):
        function = inspect.unwrap(getattr(cls, name))
        if any(test(function) for test in _LAZY_FUNCTION_CHECKS):
            raise RuleError(
                what=f"{cls.__qualname__}.{name} is a generator or a coroutine function.",
                why="calling it computes nothing, so the region would be empty.",
                fix="name the method that does the work: Remat(methods=(...,)).",
            )
        return
    methods = list(find_methods(cls))
    raise RuleError(
        what=f"{cls.__qualname__} has no method {name!r}.",
        why="a region is a method call; without the method nothing would be rematerialised.",
        fix=f"Remat(methods=({methods[0]!r},))."
        if len(methods) == 1
        else f"Remat(methods=...): {suggest_names(name, methods)}",
    )


def find_methods(cls: type) -> dict[str, Any]:
    """Return the public methods of `cls` by name, without those of nnx's base classes."""
    bases = [base for base in cls.__mro__ if base not in (nnx.Module, nnx.Pytree, nnx.Object, object)]
    found = collect_methods(bases)
    return {name: value for name, value in found.items() if not name.startswith("_") or name == "__call__"}


def _reduce_instance(self: Any, protocol: Any) -> Any:
    cls = type(self)
    generated: Any = next(base for base in cls.__mro__ if is_swapped(base))  # a user may have subclassed it
    reduced = super(generated, self).__reduce_ex__(protocol)
    if isinstance(reduced, str) or not is_swapped(cls):
        return reduced
    function, args, *rest = reduced
    args = tuple(get_base_class(cls) if item is cls else item for item in args)
    return (_revive, (cls.__dict__[_METHODS], function, args), *rest)


def _revive(methods: tuple[str, ...], function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    instance = function(*args)
    object.__setattr__(instance, "__class__", _subclass(get_base_class(type(instance)), methods))
    return instance


def _subclass(base: type, methods: tuple[str, ...]) -> type:
    return _create(base, tuple(sorted(set(methods))))


# Unbounded, since nnx's and JAX's registries keep every class alive too.
@functools.cache
def _create(base: type, methods: tuple[str, ...]) -> type:
    recipe = (_subclass, (base, methods))
    namespace = {BASE: base, RECIPE: recipe, _METHODS: methods, "__reduce_ex__": _reduce_instance}
    cls = derive(base, namespace)
    for name in methods:
        type.__setattr__(cls, name, _make_region_method(cls, name))
    return cls


class _OriginalMethod:
    """Region target of a swapped method: the base class's method, looked up when called."""

    __slots__ = ("implementation", "name", "owner")

    def __init__(self, owner: type, name: str) -> None:
        self.owner, self.name = owner, name
        # Part of the key: a method that is replaced on the class after a trace is another target.
        self.implementation = inspect.getattr_static(get_base_class(owner), name)

    def __call__(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        # Read from the instance, since `scopes` puts another subclass below the generated one.
        groups: tuple[Group, ...] = vars(module).get(_GROUPS, ())
        if groups and self.name in find_holder_methods(get_base_class(self.owner)):
            return group.call(self.run_plain, groups, module, args, kwargs)
        return self.run_plain(module, *args, **kwargs)

    def run_plain(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        """Call the base class's method."""
        return getattr(super(self.owner, module), self.name)(*args, **kwargs)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _OriginalMethod) and self._make_key() == other._make_key()

    def __hash__(self) -> int:
        return hash(self._make_key())

    def _make_key(self) -> tuple[type, str, int]:
        return (self.owner, self.name, id(self.implementation))


def _make_region_method(owner: type, name: str) -> Callable[..., Any]:
    @functools.wraps(getattr(get_base_class(owner), name))
    def call_as_region(self: Any, /, *args: Any, **kwargs: Any) -> Any:
        action = vars(self).get(_ACTION)
        target = _OriginalMethod(owner, name)
        if action is None or name not in action.methods:
            return target(self, *args, **kwargs)
        return region.call(target, action, (self, *args), kwargs, holds_tiles=bool(vars(self).get(_HOLDS_TILES)))

    return call_as_region
