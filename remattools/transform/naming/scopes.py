# SPDX-License-Identifier: Apache-2.0
"""Module paths on traced operations, without editing the model.

nnx does not put module names into a trace. While a function is traced under `record_paths`, its modules have a
temporary subclass whose methods open a `jax.named_scope` with the module's path and mark what they are passed and what
they return. Paths are relative to the region, since equal blocks share one trace. They are metadata of the operations,
so the compiled program is the same.

Works on the modules that a region rebuilt, or on a user's model during one trace; the classes are restored afterwards.
"""

import contextlib
import functools
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from ...rules.paths import Path, format_path, parse_path
from ..capture.walk import SCOPE_KEY, SCOPE_OF
from ..derive import collect_methods, derive
from ..modules import find_modules

_SCOPE_PREFIX = "rt:"
_OUTPUT_PREFIX = "rt-out:"
_INPUT_PREFIX = "rt-in:"
_SCOPE_PATTERN = re.compile(r"rt:([^/()]*)")
# In the name stack where a region begins; the module paths after it are relative to the region.
REGION = "rt-region"
# In the name stack of a program that was traced separately; the paths after it are relative to the module before it.
RELATIVE = "rt-relative"
_OUTPUT_PATTERN = re.compile(r"rt-out:(.*)#(\d+)\Z")


class _ScopeState(threading.local):
    """Per thread: path of the module that is being traced, and the number of calls by path."""

    def __init__(self) -> None:
        self.path: str | None = None
        self.calls: dict[str, int] | None = None
        self.mark_outputs = True


_scope_state = _ScopeState()


@contextlib.contextmanager
def record_paths(roots: Iterable[tuple[Path, Any]], *, mark_outputs: bool = True) -> Iterator[None]:
    """Put module paths on every operation that is traced inside the block.

    Args:
        roots: Pairs of a path and the module, or pytree of modules, at it.
        mark_outputs: Whether modules also mark what they are passed and return. Without the marks the traced program is
            the same as without this block, except for the names of its scopes.
    """
    scoped: list[tuple[Any, type]] = []
    before = (_scope_state.path, _scope_state.calls, _scope_state.mark_outputs)
    _scope_state.path, _scope_state.calls, _scope_state.mark_outputs = None, {}, mark_outputs
    try:
        for prefix, root in roots:
            for entry in find_modules(root):
                if SCOPE_KEY not in vars(entry.module):
                    cls: type = type(entry.module)
                    scoped.append((entry.module, cls))
                    object.__setattr__(entry.module, SCOPE_KEY, format_path((*prefix, *entry.path)))
                    object.__setattr__(entry.module, "__class__", _make_scoped_class(cls))
        yield
    finally:
        _scope_state.path, _scope_state.calls, _scope_state.mark_outputs = before
        for module, cls in scoped:
            object.__setattr__(module, "__class__", cls)
            vars(module).pop(SCOPE_KEY, None)


def find_path(name_stack: str) -> Path | None:
    """Return the innermost module path in an operation's name stack, or None."""
    found = _SCOPE_PATTERN.findall(name_stack)
    return parse_path(found[-1]) if found else None


def find_paths(name_stack: str) -> list[Path]:
    """Return all module paths in an operation's name stack, outermost first."""
    return [parse_path(text) for text in _SCOPE_PATTERN.findall(name_stack)]


def parse_output(name: str) -> tuple[Path, int] | None:
    """Return module path and call index of a marked output, or None for a user's `checkpoint_name`."""
    found = _OUTPUT_PATTERN.match(name)
    return (parse_path(found[1]), int(found[2])) if found else None


def parse_input(name: str) -> Path | None:
    """Return the module path of a marked input, or None for any other `checkpoint_name`."""
    return parse_path(name.removeprefix(_INPUT_PREFIX)) if name.startswith(_INPUT_PREFIX) else None


def is_mark(name: str) -> bool:
    """Whether a `checkpoint_name` is a mark of this file rather than one in the user's model."""
    return parse_output(name) is not None or parse_input(name) is not None


@functools.cache
def _make_scoped_class(cls: type) -> type:
    methods = {name: _make_scoped_method(cls, name, value) for name, value in _collect_methods(cls).items()}
    return derive(cls, {SCOPE_OF: cls, **methods})


def _collect_methods(cls: type) -> dict[str, Any]:
    """All methods that may compute: private ones too, but no special method except `__call__`."""
    library_bases = (nnx.Module, nnx.Pytree, nnx.Object, object)
    methods = collect_methods(b for b in cls.__mro__ if b not in library_bases and b.__module__ != "flax.nnx.reprlib")
    special = ("__", "_pytree__", "_graph_node", "_remattools")
    return {name: value for name, value in methods.items() if name == "__call__" or not name.startswith(special)}


def _bind_method(value: Any, instance: Any) -> Any:
    """Bind a method as attribute access would."""
    return value.__get__(instance, type(instance)) if hasattr(type(value), "__get__") else value


def _make_scoped_method(cls: type, name: str, value: Any) -> Callable[..., Any]:
    @functools.wraps(getattr(cls, name))
    def call_in_scope(self: Any, /, *args: Any, **kwargs: Any) -> Any:
        path = vars(self).get(SCOPE_KEY)
        if path is None or _scope_state.calls is None or path == _scope_state.path:
            return _bind_method(value, self)(*args, **kwargs)
        outer, _scope_state.path = _scope_state.path, path
        call = _scope_state.calls.get(path, 0)
        _scope_state.calls[path] = call + 1
        try:
            with jax.named_scope(_SCOPE_PREFIX + path):
                if not _scope_state.mark_outputs:
                    return _bind_method(value, self)(*args, **kwargs)
                args, kwargs = name_inputs(args, kwargs, path)
                return _name_outputs(_bind_method(value, self)(*args, **kwargs), f"{_OUTPUT_PREFIX}{path}#{call}")
        finally:
            _scope_state.path = outer

    return call_in_scope


def name_inputs(args: tuple[Any, ...], kwargs: dict[str, Any], path: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Name the floating-point arrays that are passed to a module, except in lists and dicts.

    Args:
        args: Positional arguments.
        kwargs: Keyword arguments.
        path: Path of the module.
    """
    # Code may ask whether two arguments are the same array (`query is key`), so each array is named once.
    named: dict[int, Any] = {}

    def name_value(value: Any) -> Any:
        if isinstance(value, jax.Array) and jax.numpy.issubdtype(value.dtype, jax.numpy.inexact):
            if id(value) not in named:
                named[id(value)] = checkpoint_name(value, f"{_INPUT_PREFIX}{path}")
            return named[id(value)]
        return tuple(map(name_value, value)) if type(value) is tuple else value

    return tuple(map(name_value, args)), {key: name_value(value) for key, value in kwargs.items()}


def _name_outputs(value: Any, name: str) -> Any:
    """Name the arrays that a module returned, except in lists and dicts, whose identity a caller may rely on."""
    if isinstance(value, jax.Array):
        return checkpoint_name(value, name)
    if type(value) is tuple:
        return tuple(_name_outputs(item, name) for item in value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_name_outputs(item, name) for item in value))
    return value
