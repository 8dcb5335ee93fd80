# SPDX-License-Identifier: Apache-2.0
"""Plain Python objects: configs, caches, recorders, and outputs that are not pytrees.

Lowest file of `transform`. Models pass such objects from block to block and write arrays into them. JAX cannot look
inside; here their state is read and set without calling the user's methods, if all of it is visible from Python.
"""

import collections
import dataclasses
import enum
import functools
import types
import typing
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
from flax import nnx

# Instances of these packages' classes (dtypes, shardings, meshes, jitted library functions) stay whole.
TRUSTED_PACKAGES = frozenset({"jax", "jaxlib", "numpy", "flax", "optax", "ml_dtypes"})
# Classes written in C whose state is visible from Python.
_CONTAINERS = (dict, list, tuple, collections.OrderedDict)
_VISIBLE_BASES = (object, *_CONTAINERS, types.SimpleNamespace, typing.Generic)
_CODE_TYPES = (
    type,
    types.ModuleType,
    types.FunctionType,
    types.BuiltinFunctionType,
    types.MethodType,
    functools.partial,
)
_ATOM_TYPES = (type(None), bool, int, float, complex, str, bytes, type(Ellipsis), range, slice, enum.Enum)
NNX_TYPES = (nnx.Variable, nnx.Pytree)
_ARRAY_TYPES = (jax.Array, *NNX_TYPES)
MAX_DEPTH = 24
# Flags of a class in CPython.
_HEAP, _IMMUTABLE, _NO_INSTANCES = 1 << 9, 1 << 8, 1 << 7


@dataclasses.dataclass(frozen=True)
class Content:
    """All state of one object.

    Attributes:
        attributes: Values by name, from `__dict__` and slots.
        items: Items of a dict, list or tuple subclass; None for any other class.
    """

    attributes: dict[str, Any]
    items: dict[Any, Any] | list[Any] | None


def get_content(value: Any) -> Content | None:
    """Return the state of a plain Python object, or None if `is_plain` is False."""
    if not is_plain(value):
        return None
    attributes: dict[str, Any] = dict(getattr(value, "__dict__", {}))
    kind: Any = type(value)
    for name in _collect_slots(kind):
        try:
            attributes[name] = object.__getattribute__(value, name)
        except AttributeError:  # the slot is empty
            continue
    if isinstance(value, dict):
        return Content(attributes, dict(value))
    return Content(attributes, list(value) if isinstance(value, list | tuple) else None)


def is_plain(value: Any) -> bool:
    """Whether `value` is a Python object whose whole state `get_content` can read."""
    kind: Any = type(value)
    return _is_visible(kind)


@functools.lru_cache(maxsize=4096)
def _is_visible(kind: type) -> bool:
    """Whether instances have all their state in attributes, or in items of a built-in container."""
    if kind in (object, *_CONTAINERS) or kind.__module__.partition(".")[0] in TRUSTED_PACKAGES:
        return False
    if issubclass(kind, (*_ATOM_TYPES, *_CODE_TYPES, *_ARRAY_TYPES, np.ndarray, np.generic)):
        return False
    # A copy must not run `__del__`.
    bases = [base for base in kind.__mro__ if base not in _VISIBLE_BASES]
    return not any(_is_written_in_c(base) or "__del__" in vars(base) for base in bases)


def _is_written_in_c(kind: type) -> bool:
    """Whether a class may have state that is invisible from Python."""
    # Python classes are heap types, mutable, and can be instantiated.
    if not kind.__flags__ & _HEAP or kind.__flags__ & (_IMMUTABLE | _NO_INSTANCES):
        return True
    # Their `__new__` and `__init__` are functions, or those of another class (a Protocol has those of `object`).
    new, init = vars(kind).get("__new__"), vars(kind).get("__init__")
    if isinstance(new, types.BuiltinFunctionType) and new.__self__ is kind:
        return True
    return isinstance(init, types.WrapperDescriptorType) and init.__objclass__ is kind


@functools.lru_cache(maxsize=4096)
def _collect_slots(kind: type) -> tuple[str, ...]:
    names = []
    for base in kind.__mro__:
        slots = base.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if name not in ("__dict__", "__weakref__"):
                private = name.startswith("__") and not name.endswith("__")
                names.append(f"_{base.__name__.lstrip('_')}{name}" if private else name)
    return tuple(names)


def create(kind: Any) -> Any:
    """Create an empty instance without calling `__init__`; not for tuples."""
    base = next(base for base in kind.__mro__ if base in _VISIBLE_BASES and base is not typing.Generic)
    return base.__new__(kind)


def set_attributes(target: Any, attributes: dict[str, Any], deleted: Iterable[str] = ()) -> None:
    """Set and delete attributes without calling `__setattr__`, also in frozen dataclasses."""
    for name, value in attributes.items():
        object.__setattr__(target, name, value)
    for name in deleted:
        object.__delattr__(target, name)


def set_items(target: Any, items: Any) -> None:
    """Replace the items of a dict, list, set or deque, or of a subclass without calling overridden methods."""
    if isinstance(target, dict):
        base: Any = collections.OrderedDict if isinstance(target, collections.OrderedDict) else dict
        base.clear(target)
        for key, value in items.items():
            base.__setitem__(target, key, value)
    elif isinstance(target, list):
        list.__setitem__(target, slice(None), items)
    elif isinstance(target, set | collections.deque):
        target.clear()
        for item in items:
            target.add(item) if isinstance(target, set) else target.append(item)


def get_children(value: Any) -> list[Any]:
    """Return the objects that a static value refers to."""
    kind = type(value)
    if isinstance(value, types.FunctionType):
        cells = []
        for cell in value.__closure__ or ():
            try:
                cells.append(cell.cell_contents)
            except ValueError:  # not assigned yet
                continue
        return cells
    if isinstance(value, types.MethodType):
        return [value.__self__]
    if isinstance(value, functools.partial):
        return [value.func, *value.args, *value.keywords.values()]
    if kind is dict:
        return list(value.values())
    if kind in (list, tuple, collections.deque):
        return list(value)
    content = get_content(value)
    if content is None:
        return []
    items = content.items.values() if isinstance(content.items, dict) else content.items or ()
    return [*content.attributes.values(), *items]


def is_mutable(value: Any) -> bool:
    """Whether a call may change the state of `value`."""
    return type(value) in (list, dict, set, collections.deque) or is_plain(value)


def has_arrays(value: Any) -> bool:
    """Whether a plain object or container holds arrays, Variables or modules, at any depth."""
    return has_instances(value, _ARRAY_TYPES)


def has_instances(value: Any, kinds: tuple[type, ...]) -> bool:
    """Whether a plain object or container holds instances of `kinds`, at any depth."""
    seen: set[int] = set()

    def search(item: Any, depth: int) -> bool:
        if isinstance(item, kinds):
            return True
        if depth > MAX_DEPTH or id(item) in seen or isinstance(item, (*_ATOM_TYPES, *_CODE_TYPES)):
            return False
        seen.add(id(item))
        return any(search(child, depth + 1) for child in get_children(item))

    return search(value, 0)
