# SPDX-License-Identifier: Apache-2.0
"""Find the models that a function closes over, and replace them.

Imports nothing of the package. People write `lambda x: loss(model, x)` as often as they pass the model. JAX would
bake its weights into the program as constants, and cannot trace abstract ones at all; so such models are found and
passed like arguments.

The user's function is never changed: a function that refers to a model is copied with other cells, defaults or
globals. The copy is also a new key of JAX's trace caches, so that none of our tracers stays in a trace that the
user's code reuses later.
"""

import copy
import functools
import types
from collections.abc import Callable, Iterator
from typing import Any

from flax import nnx

# Functions of these packages are searched for what they closed over, but not for globals.
_LIBRARIES = frozenset({"jax", "jaxlib", "flax", "numpy", "optax", "functools", "remattools"})
_MAX_DEPTH = 16

ReplaceModel = Callable[[str, Any], Any]


def find_captured_models(fn: Any) -> list[tuple[str, Any]]:
    """Return name and value of each object with nnx objects in it that `fn` closes over or uses as a global."""
    found: dict[int, tuple[str, Any]] = {}

    def record(name: str, value: Any) -> Any:
        found.setdefault(id(value), (name, value))
        return value

    _Rebinder(record).visit("fn", fn, 0)
    return list(found.values())


def replace_models(fn: Any, models: dict[int, Any]) -> Any:
    """Return a copy of `fn` that refers to other models, or `fn` itself if `models` is empty.

    Args:
        fn: The user's function.
        models: Replacements by the `id` of the original.
    """
    if not models:
        return fn
    return _Rebinder(lambda _, value: models.get(id(value), value)).visit("fn", fn, 0)


def has_models(value: Any, depth: int = 0) -> bool:
    """Whether `value` is an nnx object, or a tuple, list or dict that contains one."""
    if isinstance(value, nnx.Pytree | nnx.Variable | nnx.State):
        return True
    if depth < 4 and type(value) in (tuple, list):
        return any(has_models(item, depth + 1) for item in value)
    if depth < 4 and type(value) is dict:
        return any(has_models(item, depth + 1) for item in value.values())
    return False


class _Rebinder:
    """Walks functions and all that they refer to; `replace` maps each value with models in it to its replacement."""

    def __init__(self, replace: ReplaceModel) -> None:
        self.replace = replace
        self.seen: dict[int, Any] = {}

    def visit(self, name: str, value: Any, depth: int) -> Any:
        """Return the replacement of `value`, which is `value` itself if nothing below it changed."""
        if has_models(value):
            return self.replace(name, value)
        if depth > _MAX_DEPTH or not callable(value) or isinstance(value, type):
            return value
        if id(value) not in self.seen:
            self.seen[id(value)] = value  # ends the recursion for a function that refers to itself
            self.seen[id(value)] = self.visit_callable(value, depth + 1)
        return self.seen[id(value)]

    def visit_callable(self, value: Any, depth: int) -> Any:
        if isinstance(value, types.FunctionType):
            return self.visit_function(value, depth)
        if isinstance(value, functools.partial):
            parts = self.visit_items([("fn", value.func), *_number_values(value.args), *value.keywords.items()], depth)
            if parts is None:
                return value
            count = 1 + len(value.args)
            return functools.partial(parts[0], *parts[1:count], **dict(zip(value.keywords, parts[count:], strict=True)))
        if isinstance(value, types.MethodType):
            owner = self.visit_owner(value.__self__, depth)
            return value if owner is value.__self__ else types.MethodType(value.__func__, owner)
        if hasattr(value, "lower") and hasattr(value, "__wrapped__"):  # jitted; an outer trace inlines it anyway
            inner = self.visit("fn", value.__wrapped__, depth)
            return value if inner is value.__wrapped__ else inner
        has_python_call = isinstance(getattr(type(value), "__call__", None), types.FunctionType)  # noqa: B004
        if has_python_call and type(value).__module__.partition(".")[0] not in _LIBRARIES:
            return self.visit_owner(value, depth)
        return value

    def visit_owner(self, value: Any, depth: int) -> Any:
        """Visit the object of a bound method: a model, or an object with one, such as a trainer."""
        if has_models(value):
            return self.visit("self", value, depth)
        if not hasattr(value, "__dict__") or isinstance(value, type | types.ModuleType):
            return value
        attributes = self.visit_items(vars(value).items(), depth)
        if attributes is None:
            return value
        new = copy.copy(value)
        vars(new).update(zip(vars(value), attributes, strict=True))
        return new

    def visit_function(self, function: types.FunctionType, depth: int) -> Any:
        cells = function.__closure__ or ()
        filled = [
            (name, cell) for name, cell in zip(function.__code__.co_freevars, cells, strict=True) if _is_filled(cell)
        ]
        captured = self.visit_items([(name, cell.cell_contents) for name, cell in filled], depth)
        defaults = self.visit_items(_number_values(function.__defaults__ or ()), depth)
        keywords = self.visit_items((function.__kwdefaults__ or {}).items(), depth)
        used = dict(_find_globals(function))
        replaced = self.visit_items(used.items(), depth)
        if captured is None and defaults is None and keywords is None and replaced is None:
            return function
        contents = {} if captured is None else dict(zip((n for n, _ in filled), captured, strict=True))
        closure = tuple(
            types.CellType(contents[name]) if name in contents else cell
            for name, cell in zip(function.__code__.co_freevars, cells, strict=True)
        )
        scope = function.__globals__
        if replaced is not None:
            scope = {**scope, **dict(zip(used, replaced, strict=True))}
        new = types.FunctionType(function.__code__, scope, function.__name__, function.__defaults__, closure)
        if defaults is not None:
            new.__defaults__ = tuple(defaults)
        new.__kwdefaults__ = function.__kwdefaults__
        if keywords is not None:
            new.__kwdefaults__ = dict(zip(function.__kwdefaults__ or {}, keywords, strict=True))
        new.__qualname__, new.__module__ = function.__qualname__, function.__module__
        new.__dict__.update(function.__dict__)
        return new

    def visit_items(self, pairs: Any, depth: int) -> list[Any] | None:
        """Return the replacements of all values, or None if nothing changed."""
        pairs = list(pairs)
        new = [self.visit(name, value, depth) for name, value in pairs]
        return None if all(value is item for value, (_, item) in zip(new, pairs, strict=True)) else new


def _number_values(values: tuple[Any, ...]) -> list[tuple[str, Any]]:
    return [(f"arg{index}", value) for index, value in enumerate(values)]


def _is_filled(cell: types.CellType) -> bool:
    try:
        _ = cell.cell_contents
    except ValueError:  # the variable is not assigned yet
        return False
    return True


def _find_globals(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    if function.__module__ is None or function.__module__.partition(".")[0] in _LIBRARIES:
        return
    for name in sorted(_find_names(function.__code__)):
        if name in function.__globals__:
            yield name, function.__globals__[name]


def _find_names(code: types.CodeType) -> set[str]:
    """Collect the names that the code, or a function defined in it, may look up as globals."""
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names |= _find_names(constant)
    return names
