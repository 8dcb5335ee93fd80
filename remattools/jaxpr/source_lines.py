# SPDX-License-Identifier: Apache-2.0
"""Where in a user's code an equation comes from: file and line, without those of libraries."""

import functools
import pathlib
import sysconfig
from typing import Any

import flax
import jax

# Python's own files are not in it: they are known by their directory.
_LIBRARIES = (
    *(str(pathlib.Path(str(package.__file__)).parent) for package in (jax, flax)),
    str(pathlib.Path(__file__).parents[1]),
)


def find_source_line(equation: Any, *, with_function: bool = False) -> str:
    """Return the innermost line outside of libraries that traced an equation, as `file:line`; "" if unknown.

    Args:
        equation: The equation.
        with_function: Whether the function's name comes before: `function at file:line`.
    """
    for frame in getattr(equation.source_info.traceback, "frames", ()):
        if not is_library(frame.file_name):
            place = f"{abbreviate_path(frame.file_name)}:{frame.line_num}"
            return f"{frame.function_name} at {place}" if with_function else place
    return ""


@functools.lru_cache(maxsize=4096)
def is_library(file_name: str) -> bool:
    """Whether a file belongs to Python, JAX, flax or this package."""
    standard = sysconfig.get_path("stdlib")
    in_standard = file_name.startswith(standard) and "site-packages" not in file_name
    return in_standard or file_name.startswith(_LIBRARIES) or file_name.startswith("<frozen")


def abbreviate_path(file_name: str) -> str:
    """Return a path relative to the current directory if it lies in it."""
    path, here = pathlib.Path(file_name), pathlib.Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else file_name
