# SPDX-License-Identifier: Apache-2.0
"""Packages whose names are imported on first use (PEP 562), from the imports in their `.pyi` stub.

Importing JAX, flax and Orbax takes seconds, and a command that lists a directory needs none of them. The stub is what
type checkers and editors read, so it is the one list of what a package offers. Imports nothing of this library.
"""

import ast
import difflib
import importlib
import pathlib
import sys
from collections.abc import Callable
from typing import Any


def parse_stub(package: str, stub: str) -> dict[str, tuple[str, str]]:
    """Return the module and the name in it for each `from .module import name as name` of a stub.

    Args:
        package: Name of the package.
        stub: Source of its `.pyi` file.
    """
    return {
        alias.name: (".".join(filter(None, (package, node.module))), alias.name)
        for node in ast.parse(stub).body
        if isinstance(node, ast.ImportFrom) and node.level == 1
        for alias in node.names
    }


def attach(package: str, file: str) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return `__getattr__` and `__dir__` for the `__init__.py` of a package.

    Args:
        package: The package's `__name__`.
        file: Its `__file__`; the stub lies beside it.

    Returns:
        A function that imports a name of the stub on its first use and stores it in the package, and one that lists
        the names.

    Example:
        >>> import remattools
        >>> "apply" in dir(remattools)
        True
    """
    homes = parse_stub(package, pathlib.Path(file).with_suffix(".pyi").read_text())

    def __getattr__(name: str) -> Any:
        if name not in homes:
            near = difflib.get_close_matches(name, homes, n=3)
            hint = f" Did you mean {', '.join(near)}?" if near else ""
            raise AttributeError(f"module {package!r} has no attribute {name!r}.{hint}", name=name)
        module, attribute = homes[name]
        home = vars(importlib.import_module(module))
        # `from . import x` names a submodule, which becomes an attribute only once it has been imported.
        value = home[attribute] if attribute in home else importlib.import_module(f"{module}.{attribute}")
        setattr(sys.modules[package], name, value)
        return value

    return __getattr__, lambda: sorted(homes)
