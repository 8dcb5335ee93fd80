# SPDX-License-Identifier: Apache-2.0
"""Plain Python objects: configs, caches, recorders, outputs that are no pytrees.

Lowest file of `transform`. Models hand such objects from block to block, and write
arrays into them. JAX cannot look inside; here their state is read and set past
the user's own methods, wherever all of it can be seen from Python.
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

# Instances of these packages' classes (dtypes, shardings, meshes, jitted library functions) are never taken apart.
TRUSTED_PACKAGES = frozenset({"jax", "jaxlib", "numpy", "flax", "optax", "ml_dtypes"})
# Classes written in C of which Python shows all.
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
_MAX_DEPTH = 24
# Flags of a class in CPython.
_HEAP, _IMMUTABLE, _NO_INSTANCES = 1 << 9, 1 << 8, 1 << 7


@dataclasses.dataclass(frozen=True)
class Content:
    """All state of one object.

    Attributes:
        attributes: By name, of `__dict__` and of slots.
        items: What it holds as a dict, list or tuple; None if it is none.
    """

    attributes: dict[str, Any]
    items: dict[Any, Any] | list[Any] | None


def get_content(value: Any) -> Content | None:
    """State of a plain Python object, or None if it is none or some of it is out of sight."""
    if not is_plain(value):
        return None
    attributes: dict[str, Any] = dict(getattr(value, "__dict__", {}))
    kind: Any = type(value)
    for name in _collect_slots(kind):
        try:
            attributes[name] = object.__getattribute__(value, name)
        except AttributeError:  # not set
            continue
    if isinstance(value, dict):
        return Content(attributes, dict(value))
    return Content(attributes, list(value) if isinstance(value, list | tuple) else None)


def is_plain(value: Any) -> bool:
    """Whether `content_of` shows the state of `value`."""
    kind: Any = type(value)
    return _is_visible(kind)


@functools.lru_cache(maxsize=4096)
def _is_visible(kind: type) -> bool:
    """Whether instances keep all their state in attributes, or in a container that Python shows."""
    if kind in (object, *_CONTAINERS) or kind.__module__.partition(".")[0] in TRUSTED_PACKAGES:
        return False
    if issubclass(kind, (*_ATOM_TYPES, *_CODE_TYPES, *_ARRAY_TYPES, np.ndarray, np.generic)):
        return False
    # What happens at an object's end must not happen at a copy's.
    bases = [base for base in kind.__mro__ if base not in _VISIBLE_BASES]
    return not any(_is_written_in_c(base) or "__del__" in vars(base) for base in bases)


def _is_written_in_c(kind: type) -> bool:
    """Whether a class may keep state where Python cannot see it."""
    # Classes of Python are made at run time, can be changed, and can be instantiated.
    if not kind.__flags__ & _HEAP or kind.__flags__ & (_IMMUTABLE | _NO_INSTANCES):
        return True
    # Their `__new__` and `__init__` are functions, or borrowed (a Protocol takes those of `object`).
    own = vars(kind)
    makes, starts = own.get("__new__"), own.get("__init__")
    if isinstance(makes, types.BuiltinFunctionType) and makes.__self__ is kind:
        return True
    return isinstance(starts, types.WrapperDescriptorType) and starts.__objclass__ is kind


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
    """An empty object of a class, past its `__init__`; not for tuples."""
    base = next(base for base in kind.__mro__ if base in _VISIBLE_BASES and base is not typing.Generic)
    return base.__new__(kind)


def set_attributes(target: Any, attributes: dict[str, Any], deleted: Iterable[str] = ()) -> None:
    """Set and delete attributes past `__setattr__`, frozen dataclasses included."""
    for name, value in attributes.items():
        object.__setattr__(target, name, value)
    for name in deleted:
        object.__delattr__(target, name)


def set_items(target: Any, items: Any) -> None:
    """Give a dict, list, set or deque, or an instance of a subclass, other items, past overridden methods."""
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
    """What a value that is not traced refers to."""
    kind = type(value)
    if isinstance(value, types.FunctionType):
        cells = []
        for cell in value.__closure__ or ():
            try:
                cells.append(cell.cell_contents)
            except ValueError:  # still empty
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
    """Whether a call may leave something in it that has to be told apart from what was there."""
    return type(value) in (list, dict, set, collections.deque) or is_plain(value)


def has_arrays(value: Any) -> bool:
    """Whether arrays, Variables or modules are among what a plain object holds, at any depth."""
    return has_instances(value, _ARRAY_TYPES)


def has_instances(value: Any, kinds: tuple[type, ...]) -> bool:
    """Whether instances of `kinds` are among what a plain object or container holds, at any depth."""
    seen: set[int] = set()

    def search(item: Any, depth: int) -> bool:
        if isinstance(item, kinds):
            return True
        if depth > _MAX_DEPTH or id(item) in seen or isinstance(item, (*_ATOM_TYPES, *_CODE_TYPES)):
            return False
        seen.add(id(item))
        return any(search(child, depth + 1) for child in get_children(item))

    return search(value, 0)
