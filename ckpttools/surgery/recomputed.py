# SPDX-License-Identifier: Apache-2.0
"""Recognise recomputed variables on disk by their names, where nothing there says what they are.

Our own steps record the type of such a variable. The checkpoints of other programs do not, nor do those of earlier
versions, so a suggestion would count attention caches as lost. Only suggestions use these names: a restore never
ignores a leaf because of them.
"""

from collections.abc import Collection, Iterable

from ..tree.leaf_paths import Names

_NAMES = dict.fromkeys(("cached_key", "cached_value", "cache_index"), "Cache")
"""Leaves of flax's attention, in linen and nnx."""

_COLLECTIONS = {"cache": "Cache", "intermediates": "Intermediate"}
"""Collections of linen: the part below the item."""


def find_recomputed(
    stored: Iterable[Names], state: Collection[Names], excluded: Iterable[Names], types: Collection[str]
) -> frozenset[Names]:
    """Return the stored leaves that are likely recomputed variables.

    Args:
        stored: Names of the leaves on disk.
        state: Names of the leaves that are state.
        excluded: Names of the leaves of the program that are not: a leaf on disk whose name ends like one of them, and
            like no leaf of the state, is such a variable under an earlier name.
        types: The types of variables that the rules of the run exclude.
    """
    ends = {_get_end(path) for path in excluded} | {name for name, kind in _NAMES.items() if kind in types}
    ends -= set(map(_get_end, state))
    collections = {name for name, kind in _COLLECTIONS.items() if kind in types}
    return frozenset(
        path for path in stored if path not in state and (_get_end(path) in ends or collections.intersection(path[1:2]))
    )


def _get_end(path: Names) -> str:
    """Return the last part of a name that is not a number or the `value` of a variable."""
    return next((part for part in reversed(path[1:]) if not part.isdecimal() and part != "value"), path[-1])
