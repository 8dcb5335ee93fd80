# SPDX-License-Identifier: Apache-2.0
"""The modules of a model, each with all paths that reach it.

`nnx.iter_modules` yields one path for each module; a rule has to match by any of them (`self.first = self.layers[0]`),
and has to know which modules are containers.
"""

import dataclasses
import functools
from typing import Any

from flax import nnx

from ..rules.paths import Path
from .capture import walk
from .derive import get_base_class

# Of a module with very many paths only the first are recorded.
_MAX_PATHS = 64
_CONTAINER_TYPES = (nnx.List, nnx.Dict)


@dataclasses.dataclass
class ModuleEntry:
    """One module of a model.

    Attributes:
        module: The instance.
        paths: Every path from the root; the first is the one that nnx yields.
        class_names: Names of its class and its bases, without the generated class of a swap.
        container: Whether it holds modules and computes nothing (`nnx.List`, `nnx.Dict`).
    """

    module: Any
    paths: list[Path]
    class_names: tuple[str, ...]
    container: bool

    @property
    def path(self) -> Path:
        """The first path."""
        return self.paths[0]


def find_modules(model: Any) -> list[ModuleEntry]:
    """Return all modules reachable from `model`, itself first, in the order of nnx (attributes by name).

    Args:
        model: An nnx module, or any pytree that holds modules; concrete or abstract.
    """
    entries: dict[int, ModuleEntry] = {}
    cls: type = type(model)
    if _is_module_holder(cls):
        _visit(model, (), (), entries)
    return list(entries.values())


def _visit(value: Any, path: Path, above: tuple[int, ...], entries: dict[int, ModuleEntry]) -> None:
    if id(value) in above:  # a module that refers to its parent: the path would never end
        return
    if isinstance(value, nnx.Pytree):
        if isinstance(value, nnx.Module) and not _add_path(value, path, entries):
            return
        children: Any = walk.get_node_content(value).items()
    elif isinstance(value, dict):
        children = value.items()
    else:
        children = enumerate(value)
    for key, child in children:
        cls: type = type(child)
        if _is_module_holder(cls) and not (isinstance(key, str) and key.startswith("_pytree__")):
            _visit(child, (*path, key), (*above, id(value)), entries)


@functools.lru_cache(maxsize=4096)
def _is_module_holder(cls: type) -> bool:
    return issubclass(cls, nnx.Pytree | dict | list | tuple)


def _add_path(module: nnx.Module, path: Path, entries: dict[int, ModuleEntry]) -> bool:
    """Record a path; False if the module's children need not be visited."""
    entry = entries.get(id(module))
    if entry is None:
        entries[id(module)] = ModuleEntry(module, [path], *_inspect_class(get_base_class(type(module))))
        return True
    if len(entry.paths) >= _MAX_PATHS:
        return False
    entry.paths.append(path)
    return True


@functools.lru_cache(maxsize=4096)
def _inspect_class(cls: type) -> tuple[tuple[str, ...], bool]:
    """Names of a class and its bases, and whether it is a container."""
    return tuple(base.__name__ for base in cls.__mro__ if base is not object), is_container(cls)


def is_container(cls: type) -> bool:
    """Whether a class is one of nnx's containers, or a subclass without a `__call__`."""
    return issubclass(cls, _CONTAINER_TYPES) and not any("__call__" in vars(base) for base in cls.__mro__)
