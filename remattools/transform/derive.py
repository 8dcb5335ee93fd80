# SPDX-License-Identifier: Apache-2.0
"""Subclasses that a user's code does not notice.

Below `swap` and `scopes`, which fill them with methods; knows nothing of regions.

Facts that shaped this file:

-   A user's `__init_subclass__`, metaclass or registry must not notice the
    subclass, so it is created past them; what nnx needs is registered here.
-   `pickle` finds a class by its name, which the subclass shares with its base: it
    reduces to its recipe instead.
"""

import abc
import copyreg
import functools
import inspect
from collections.abc import Iterable
from typing import Any

import jax
from flax.nnx import graphlib

# In the namespace of a class that `swap` has made: the user's class behind it.
BASE = "_remattools_base"
# A function and its arguments that make the class again, for pickle; without it the class is found by its name.
RECIPE = "_remattools_recipe"
_GENERATED = "_remattools_generated"


def is_swapped(cls: type) -> bool:
    """Whether `cls` was generated here (rather than derived from such a class by a user)."""
    return BASE in cls.__dict__


def get_base_class(cls: type) -> type:
    """The user's class behind a generated one; any other class itself."""
    return cls.__dict__[BASE] if is_swapped(cls) else cls


def collect_methods(bases: Iterable[type]) -> dict[str, Any]:
    """Methods by name, the first of `bases` that has a name deciding what it is.

    A function is one, and so is what binds to an instance like one: a jitted function,
    a partial method. Of the call Python asks only that it can be called in the end.
    """
    first: dict[str, Any] = {}
    for base in bases:
        for name, value in vars(base).items():
            first.setdefault(name, value)
    return {
        name: value for name, value in first.items() if _is_method(value) or (name == "__call__" and value is not None)
    }


def _is_method(value: Any) -> bool:
    if inspect.isfunction(value) or isinstance(value, functools.partialmethod):
        return True
    # A class or a static method binds to no instance.
    return callable(value) and hasattr(type(value), "__get__") and not isinstance(value, type | staticmethod)


class _Shield:
    """Stands between a generated class and its base in the method resolution order."""

    __slots__ = ()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        if _GENERATED not in cls.__dict__:  # derived by a user, as in `class A(type(model))`
            super().__init_subclass__(**kwargs)


def derive(base: type, namespace: dict[str, Any]) -> type:
    """A subclass of `base` with its names, whose creation runs no code of the user.

    `type(base)(...)` would call the user's metaclass and `__init_subclass__`, which may
    register classes or require arguments. So the class is made by ABCMeta, which
    nnx's metaclass derives from, and a shield in its resolution order ends the chain
    of `__init_subclass__`. The shield is no base of it: Python swaps the class of an
    instance only between equal layouts, which a second base would change.
    """
    names = {key: getattr(base, key) for key in ("__module__", "__qualname__", "__doc__")}
    cls: type = abc.ABCMeta.__new__(
        _make_metaclass(type(base)), base.__name__, (base,), {**names, _GENERATED: True, **namespace}
    )
    _register(cls, base)
    return cls


@functools.cache
def _make_metaclass(meta: type) -> type:
    """A metaclass of ours for each of theirs: places the shield, and tells pickle of the reducer below."""

    def mro(cls: Any) -> list[type]:
        order = type.mro(cls)
        return [cls, _Shield, *order[1:]] if _GENERATED in cls.__dict__ else order

    own = type.__new__(type(meta), f"Rematerialised{meta.__name__}", (meta,), {"mro": mro})
    copyreg.pickle(own, _reduce_class)
    return own


def _reduce_class(cls: type) -> Any:
    return cls.__dict__.get(RECIPE, cls.__qualname__)


def _register(cls: Any, base: Any) -> None:
    """What nnx's own `__init_subclass__` does for a class of a user."""
    graphlib.register_graph_node_type(
        type=cls,
        flatten=cls._graph_node_flatten,
        set_key=cls._graph_node_set_key,
        pop_key=cls._graph_node_pop_key,
        create_empty=cls._graph_node_create_empty,
        clear=cls._graph_node_clear,
        init=cls._graph_node_init,
    )
    if base._pytree__is_pytree:
        jax.tree_util.register_pytree_with_keys(
            cls,
            flatten_with_keys=cls._pytree__flatten_with_paths,
            unflatten_func=cls._pytree__unflatten,
            flatten_func=cls._pytree__flatten,
        )
