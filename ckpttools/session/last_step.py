# SPDX-License-Identifier: Apache-2.0
"""The last completed step, which can still be saved when an exception ends the loop, if its state is unchanged.

A loop changes its state between two calls of `Session.step`, so an exception may leave half of the next update. Device
arrays are immutable, so they are compared by identity; everything else is compared by value.
"""

import functools
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from ..spec.state import Exclude, find_exclusion
from ..store import digest
from ..tree import flatten
from ..tree.leaf_paths import Path, format_leaf_name


class LastStep:
    """The arguments of the last call of `Session.step`, and checks for changes of its state since.

    Args:
        rules: What is not state, and may change.

    Attributes:
        step: Completed updates; 0 before the first call.
        state: Items by name.
        metrics: Metrics of that step, by name.
    """

    def __init__(self, rules: Sequence[Exclude] = ()) -> None:
        self._rules = rules
        self.step = 0
        self.state: Mapping[str, Any] = {}
        self.metrics: Mapping[str, Any] = {}
        self._checks: dict[str, Callable[[Any], bool]] = {}

    def record(self, step: int, state: Mapping[str, Any], metrics: Mapping[str, Any]) -> None:
        """Remember a completed step."""
        self.step = 0  # An interrupt below must not mix two steps.
        self._checks = {name: _make_check(value) for name, value in self._list_leaves(state)}
        self.state, self.metrics, self.step = state, metrics, step

    def find_changed_leaf(self) -> str | None:
        """Return the name of a leaf that has changed since that step; None if none has."""
        leaves = dict(self._list_leaves(self.state))
        for name in self._checks.keys() ^ leaves.keys():
            return name
        return next((name for name, value in leaves.items() if not self._checks[name](value)), None)

    def _list_leaves(self, state: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
        for item, value in state.items():
            find_reason = functools.partial(self._find_reason, item)
            for leaf in flatten.flatten_item(value, find_reason=find_reason).leaves:
                yield format_leaf_name(item, leaf.path), leaf.value

    def _find_reason(self, item: str, path: Path, types: tuple[str, ...]) -> str:
        return find_exclusion(self._rules, (item, *path), types)


def _make_check(value: Any) -> Callable[[Any], bool]:
    """Return a function that compares a later value with this one; it does not keep a device array alive."""
    if isinstance(value, jax.Array):
        reference = weakref.ref(value)
        return lambda later: isinstance(later, jax.Array) and later is reference() and not later.is_deleted()
    if isinstance(value, np.ndarray):
        before = value.shape, value.dtype, digest.hash_array("xxh3", value)
        return lambda later: (
            isinstance(later, np.ndarray)
            and (later.shape, later.dtype) == before[:2]
            and digest.hash_array("xxh3", later) == before[2]
        )
    # By its form, since NaN is not equal to itself.
    return lambda later: type(later) is type(value) and repr(later) == repr(value)
