# SPDX-License-Identifier: Apache-2.0
"""Static values as cache keys: when may two calls share one trace?

Lowest file of `transform`. Real models carry lists, dicts, config objects and
lambdas as static attributes; most of them cannot be hashed, and some change
between two traces. `Freezer.freeze` turns a value into a hashable key that
compares by *value*, so that a change is seen and equal blocks share, and notes
where that is not possible: a value that holds arrays out of reach, or whose
content cannot be seen at all, makes its block trace on its own.
"""

import dataclasses
import enum
import functools
import types
from typing import Any

import jax
import numpy as np
from flax import nnx

# Containers nested deeper than this, or cyclic ones, are not shared.
_MAX_DEPTH = 24
# Immutable leaves that compare by value (floats have their own rule).
_PLAIN = (type(None), bool, int, str, bytes, complex, type(Ellipsis), range)
# Instances of these packages' classes (dtypes, shardings, meshes, jitted library functions) are treated as
# immutable when hashable: their own `__eq__` decides.
_TRUSTED_PACKAGES = frozenset({"jax", "jaxlib", "numpy", "flax", "optax", "ml_dtypes"})


class Identity:
    """Compares by the identity of what it holds, and keeps it alive."""

    __slots__ = ("value",)

    def __init__(self, value: object) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Identity) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


@dataclasses.dataclass
class Freezer:
    """Collects what the keys of one call allow.

    Attributes:
        unshareable: What could not be turned into a key, or None; if there is
            such a value, its block shares its trace with no other.
    """

    unshareable: Any = None

    def freeze(self, value: Any, depth: int = 0) -> Any:
        """A hashable key of `value`; equal keys mean interchangeable values."""
        kind = type(value)
        if kind in _PLAIN:
            return (kind, value)
        if kind is float:
            # repr tells -0.0 from 0.0 and makes a NaN equal to itself.
            return (float, repr(value))
        if depth > _MAX_DEPTH:
            return self._opaque(value)
        if isinstance(value, type | types.ModuleType | types.BuiltinFunctionType | enum.Enum):
            return Identity(value)
        if isinstance(value, jax.Array | nnx.Variable | nnx.Pytree):
            return self._opaque(value)
        below = depth + 1
        if isinstance(value, np.ndarray | np.generic):
            return self._numpy(value)
        if kind in (list, tuple):
            return (kind, tuple(self.freeze(item, below) for item in value))
        if kind is slice:
            return (kind, self.freeze((value.start, value.stop, value.step), below))
        if kind in (set, frozenset):
            return (kind, frozenset(self.freeze(item, below) for item in value))
        if kind in (dict, types.MappingProxyType):
            return (kind, tuple((self.freeze(k, below), self.freeze(v, below)) for k, v in value.items()))
        if isinstance(value, types.FunctionType):
            return self._function(value, below)
        if isinstance(value, types.MethodType):
            return (kind, self.freeze(value.__func__, below), self.freeze(value.__self__, below))
        if isinstance(value, functools.partial):
            parts = (value.func, value.args, value.keywords)
            return (kind, tuple(self.freeze(part, below) for part in parts))
        return self._object(value, below)

    def _numpy(self, value: Any) -> Any:
        if value.dtype.hasobject:
            return self._opaque(value)
        return (type(value), value.dtype, value.shape, value.tobytes())

    def _function(self, function: types.FunctionType, depth: int) -> Any:
        """Two functions are one if code, globals and everything they captured are."""
        try:
            cells = tuple(cell.cell_contents for cell in function.__closure__ or ())
        except ValueError:  # a cell that is still empty: a function that refers to itself
            return self._opaque(function)
        captured = (cells, function.__defaults__, function.__kwdefaults__)
        attributes = {k: v for k, v in vars(function).items() if k != "__wrapped__"}
        return (
            types.FunctionType,
            Identity(function.__code__),
            Identity(function.__globals__),
            self.freeze(captured, depth),
            self.freeze(attributes, depth) if attributes else None,
        )

    def _object(self, value: Any, depth: int) -> Any:
        kind = type(value)
        package = kind.__module__.partition(".")[0]
        if package in _TRUSTED_PACKAGES or hasattr(kind, "__jax_array__"):
            # Identity alone says nothing of an object's content (a random generator), but a library's functions have
            # none that changes.
            own_hash: Any = kind.__hash__
            if own_hash is None or (own_hash is object.__hash__ and not callable(value)):
                return self._opaque(value)
            try:
                hash(value)
            except TypeError:  # a tuple-like value that holds something unhashable
                return self._opaque(value)
            # A jitted function is immutable but for what its Python function captured.
            wrapped = getattr(value, "__wrapped__", None)
            return (kind, value) if wrapped is None else (kind, value, self.freeze(wrapped, depth))
        content = _content(value)
        if content is None:
            return self._opaque(value)
        return (Identity(kind), self.freeze(content, depth))

    def _opaque(self, value: object) -> Any:
        self.unshareable = value
        return Identity(value)


def _content(value: Any) -> dict[str, Any] | None:
    """All instance state of a plain Python object, or None if some is out of sight."""
    kind = type(value)
    if any(base.__module__ == "builtins" and base is not object for base in kind.__mro__):
        # A subclass of list, dict, str, ...: part of its state lives in the base.
        if isinstance(value, dict):
            return {**vars(value), "": dict(value)} if hasattr(value, "__dict__") else {"": dict(value)}
        if isinstance(value, list | tuple):
            return {**getattr(value, "__dict__", {}), "": tuple(value)}
        return None
    state: dict[str, Any] = dict(getattr(value, "__dict__", {}))
    for base in kind.__mro__:
        slots = base.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if name not in ("__dict__", "__weakref__") and hasattr(value, name):
                state[name] = getattr(value, name)
    if not state and not hasattr(value, "__dict__"):
        return None  # written in C: nothing to compare
    return state
