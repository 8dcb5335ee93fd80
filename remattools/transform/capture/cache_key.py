# SPDX-License-Identifier: Apache-2.0
"""Static values as cache keys: when may two calls share one trace?

Sits on `plain_objects`. Real models have lists, dicts, config objects and lambdas as static attributes; most of them
are not hashable, and some change between two traces. `Freezer.freeze` turns a value into a hashable key that compares
by *value*, so that a change is detected and equal blocks share a trace. It records a value for which that is
impossible, since its content is not visible or contains arrays; the block that has it is traced separately.
"""

import collections
import dataclasses
import enum
import functools
import types
from typing import Any

import jax
import numpy as np
from flax import nnx

from . import plain_objects

# Immutable values that compare by value; floats are handled separately.
_PLAIN_TYPES = (type(None), bool, int, str, bytes, type(Ellipsis), range)


class Identity:
    """Compares by the identity of a value, and keeps the value alive."""

    __slots__ = ("value",)

    def __init__(self, value: object) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Identity) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


@dataclasses.dataclass
class Freezer:
    """Makes the keys of one call.

    Attributes:
        unshareable: A value that has no key by value, or None; if there is one, the block does not share its trace.
    """

    unshareable: Any = None

    def freeze(self, value: Any, depth: int = 0) -> Any:
        """Return a hashable key of `value`; values with equal keys are interchangeable."""
        kind = type(value)
        if kind in _PLAIN_TYPES:
            return (kind, value)
        if kind in (float, complex):
            # repr distinguishes -0.0 from 0.0, and makes a NaN equal to itself.
            return (kind, repr(value))
        if depth > plain_objects.MAX_DEPTH:  # or cyclic
            return self._freeze_by_identity(value)
        if isinstance(value, type | types.ModuleType | types.BuiltinFunctionType | enum.Enum):
            return Identity(value)
        if isinstance(value, jax.Array | nnx.Variable | nnx.Pytree):
            return self._freeze_by_identity(value)
        below = depth + 1
        if isinstance(value, np.ndarray | np.generic):
            return self._freeze_numpy(value)
        if kind in (list, tuple, set, frozenset):
            # Equal sets may iterate in different orders, which gives two keys.
            return (kind, tuple(self.freeze(item, below) for item in value))
        if kind is collections.deque:
            return (kind, value.maxlen, tuple(self.freeze(item, below) for item in value))
        if kind is slice:
            return (kind, self.freeze((value.start, value.stop, value.step), below))
        if kind in (dict, types.MappingProxyType):
            return (kind, tuple((self.freeze(k, below), self.freeze(v, below)) for k, v in value.items()))
        if isinstance(value, types.FunctionType):
            return self._freeze_function(value, below)
        if isinstance(value, types.MethodType):
            return (kind, self.freeze(value.__func__, below), self.freeze(value.__self__, below))
        if isinstance(value, functools.partial):
            parts = (value.func, value.args, value.keywords)
            return (kind, tuple(self.freeze(part, below) for part in parts))
        return self._freeze_object(value, below)

    def _freeze_numpy(self, value: Any) -> Any:
        if value.dtype.hasobject:
            return self._freeze_by_identity(value)
        return (type(value), value.dtype, value.shape, value.tobytes())

    def _freeze_function(self, function: types.FunctionType, depth: int) -> Any:
        """Functions are interchangeable if code, globals, defaults and closures are."""
        try:
            cells = tuple(cell.cell_contents for cell in function.__closure__ or ())
        except ValueError:  # a cell is not assigned yet: the function refers to itself
            return self._freeze_by_identity(function)
        captured = (cells, function.__defaults__, function.__kwdefaults__)
        attributes = {k: v for k, v in vars(function).items() if k != "__wrapped__"}
        return (
            types.FunctionType,
            Identity(function.__code__),
            Identity(function.__globals__),
            self.freeze(captured, depth),
            self.freeze(attributes, depth) if attributes else None,
        )

    def _freeze_object(self, value: Any, depth: int) -> Any:
        kind = type(value)
        package = kind.__module__.partition(".")[0]
        # Hashable instances of trusted packages count as immutable: their `__eq__` decides.
        if package in plain_objects.TRUSTED_PACKAGES or hasattr(kind, "__jax_array__"):
            # A hash by identity does not cover mutable content (a random generator); a library's functions have none.
            own_hash: Any = kind.__hash__
            if own_hash is None or (own_hash is object.__hash__ and not callable(value)):
                return self._freeze_by_identity(value)
            try:
                hash(value)
            except TypeError:  # a tuple-like value with an unhashable item
                return self._freeze_by_identity(value)
            # A jitted function is immutable except for what its Python function closes over.
            wrapped = getattr(value, "__wrapped__", None)
            return (kind, value) if wrapped is None else (kind, value, self.freeze(wrapped, depth))
        content = plain_objects.get_content(value)
        if content is None:
            return self._freeze_by_identity(value)
        return (Identity(kind), self.freeze(content.attributes, depth), self.freeze(content.items, depth))

    def _freeze_by_identity(self, value: object) -> Any:
        self.unshareable = value
        return Identity(value)
