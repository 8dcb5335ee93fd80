# SPDX-License-Identifier: Apache-2.0
"""A function as what a region runs: two decorations of one function share a trace."""

from collections.abc import Callable
from typing import Any


class FunctionTarget:
    """Region target of a decorated function; equal for two decorations of one function, so that they share a trace."""

    __slots__ = ("function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function."""
        return self.function(*args, **kwargs)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, FunctionTarget) and self.function is other.function

    def __hash__(self) -> int:
        return hash(self.function)
