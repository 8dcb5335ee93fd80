# SPDX-License-Identifier: Apache-2.0
"""Generated subclasses that a user's code does not notice.

Below `swap` and `scopes`, which add the methods; knows nothing of regions.

Facts that shaped this file:

-   A user's `__init_subclass__`, metaclass or registry must not see the subclass, so creating it bypasses them; what
    nnx needs is registered here.
-   `pickle` finds a class by its name, which the subclass shares with its base. So it is pickled by its recipe.
"""

import abc
import copyreg
import functools
import inspect
from collections.abc import Iterable
from typing import Any

import jax
from flax.nnx import graphlib

# In the namespace of a class that `swap` generated: the user's class.
BASE = "_remattools_base"
# For pickle: a function and its arguments that recreate the class. Without it the class is pickled by its name.
RECIPE = "_remattools_recipe"
_GENERATED = "_remattools_generated"


def is_swapped(cls: type) -> bool:
    """Whether `swap` generated `cls` itself; False for a user's subclass of such a class."""
    return BASE in cls.__dict__


def get_base_class(cls: type) -> type:
    """Return the user's class behind a generated one, or `cls` itself."""
    return cls.__dict__[BASE] if is_swapped(cls) else cls


def collect_methods(bases: Iterable[type]) -> dict[str, Any]:
    """Return the methods of `bases` by name; the first base that has a name decides.

    Methods are functions and everything that binds to an instance like a function: a jitted function, a partial
    method. `__call__` may be any object that is not None.
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
    # A class or a static method does not bind to an instance.
    return callable(value) and hasattr(type(value), "__get__") and not isinstance(value, type | staticmethod)


class _Shield:
    """Comes between a generated class and its base in the method resolution order."""

    __slots__ = ()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        if _GENERATED not in cls.__dict__:  # a user's subclass, as in `class A(type(model))`
            super().__init_subclass__(**kwargs)


def derive(base: type, namespace: dict[str, Any]) -> type:
    """Create a subclass of `base` with the same names, without running any of the user's code.

    `type(base)(...)` would call the user's metaclass and `__init_subclass__`, which may register classes or require
    arguments. So ABCMeta, the base of nnx's metaclass, creates the class, and a shield in its method resolution order
    ends the chain of `__init_subclass__`. The shield is not a base: a second base would change the instance layout,
    and Python assigns `__class__` only between equal layouts.
    """
    names = {key: getattr(base, key) for key in ("__module__", "__qualname__", "__doc__")}
    cls: type = abc.ABCMeta.__new__(
        _make_metaclass(type(base)), base.__name__, (base,), {**names, _GENERATED: True, **namespace}
    )
    _register(cls, base)
    return cls


@functools.cache
def _make_metaclass(meta: type) -> type:
    """Create a submetaclass of `meta` that inserts the shield and is registered with pickle."""

    def mro(cls: Any) -> list[type]:
        order = type.mro(cls)
        return [cls, _Shield, *order[1:]] if _GENERATED in cls.__dict__ else order

    derived = type.__new__(type(meta), f"Rematerialised{meta.__name__}", (meta,), {"mro": mro})
    copyreg.pickle(derived, _reduce_class)
    return derived


def _reduce_class(cls: type) -> Any:
    return cls.__dict__.get(RECIPE, cls.__qualname__)


def _register(cls: Any, base: Any) -> None:
    """Register a class as the `__init_subclass__` of nnx would."""
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
