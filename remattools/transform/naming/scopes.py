# SPDX-License-Identifier: Apache-2.0
"""Module paths on traced operations, without an edit of the model.

nnx puts no module names into a trace. While a function is traced under
`recorded`, the modules it sees carry a temporary subclass whose methods open a
`jax.named_scope` with the module's path and mark what they return. Paths are
relative to the region, since equal blocks share one trace; they ride in the
operations' metadata, so the compiled program is the same.

Works on modules that the region rebuilt for itself, or on a user's model for the
length of one trace; either way the classes are put back before anybody looks.
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
_SCOPE_PATTERN = re.compile(r"rt:([^/()]*)")
# Stands in the name stack where a region begins; module paths behind it are relative to the region.
REGION = "rt-region"
# Likewise where no region begins: a program that was traced on its own, from the module before the mark.
RELATIVE = "rt-relative"
_OUTPUT_PATTERN = re.compile(r"rt-out:(.*)#(\d+)\Z")


class _ScopeState(threading.local):
    """Per thread: the module whose code is being traced, and how often each path was called."""

    def __init__(self) -> None:
        self.path: str | None = None
        self.calls: dict[str, int] | None = None


_scope_state = _ScopeState()


@contextlib.contextmanager
def record_paths(roots: Iterable[tuple[Path, Any]]) -> Iterator[None]:
    """Trace inside this block with the modules' paths on every operation.

    Args:
        roots: Pairs of a path and a value (module or pytree of modules) at it.
    """
    scoped: list[tuple[Any, type]] = []
    before = (_scope_state.path, _scope_state.calls)
    _scope_state.path, _scope_state.calls = None, {}
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
        _scope_state.path, _scope_state.calls = before
        for module, cls in scoped:
            object.__setattr__(module, "__class__", cls)
            vars(module).pop(SCOPE_KEY, None)


def find_path(name_stack: str) -> Path | None:
    """The innermost module path in an operation's name stack, or None."""
    found = _SCOPE_PATTERN.findall(name_stack)
    return parse_path(found[-1]) if found else None


def find_paths(name_stack: str) -> list[Path]:
    """All module paths in an operation's name stack, the outermost first."""
    return [parse_path(text) for text in _SCOPE_PATTERN.findall(name_stack)]


def parse_output(name: str) -> tuple[Path, int] | None:
    """Module path and call index of a marked output, or None for a name of the user."""
    found = _OUTPUT_PATTERN.match(name)
    return (parse_path(found[1]), int(found[2])) if found else None


@functools.cache
def _make_scoped_class(cls: type) -> type:
    methods = {name: _make_scoped_method(cls, name, value) for name, value in _collect_methods(cls).items()}
    return derive(cls, {SCOPE_OF: cls, **methods})


def _collect_methods(cls: type) -> dict[str, Any]:
    """Everything that may compute: private helpers too, but no special method except the call."""
    nothing = (nnx.Module, nnx.Pytree, nnx.Object, object)
    found = collect_methods(b for b in cls.__mro__ if b not in nothing and b.__module__ != "flax.nnx.reprlib")
    special = ("__", "_pytree__", "_graph_node", "_remattools")
    return {name: value for name, value in found.items() if name == "__call__" or not name.startswith(special)}


def _bind_method(value: Any, instance: Any) -> Any:
    """A method of a class as Python would give it to a caller."""
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
                return _name_outputs(_bind_method(value, self)(*args, **kwargs), f"{_OUTPUT_PREFIX}{path}#{call}")
        finally:
            _scope_state.path = outer

    return call_in_scope


def _name_outputs(value: Any, name: str) -> Any:
    """Name the arrays a module returned; lists and dicts stay as they are, since a caller may hold them."""
    if isinstance(value, jax.Array):
        return checkpoint_name(value, name)
    if type(value) is tuple:
        return tuple(_name_outputs(item, name) for item in value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_name_outputs(item, name) for item in value))
    return value
