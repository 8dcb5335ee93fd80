# SPDX-License-Identifier: Apache-2.0
"""Does a stored leaf fit a leaf of the state that was passed in? Exactly, or the difference is described.

No dtype is cast and no shape is changed here: an int32 template for float32 weights is a mistake, and Orbax's silent
truncation of it is one of the defects this package exists for. Changes are declared (`spec.surgery`).
"""

import dataclasses
import difflib
import functools
import re
from collections.abc import Sequence
from typing import Literal

from .leaf_paths import Names, format_leaf_name, to_names
from .leaves import Leaf, describe, is_array
from .records import Record, encode_value, format_form


@dataclasses.dataclass(frozen=True, kw_only=True)
class Difference:
    """One leaf that does not fit.

    Attributes:
        kind: "missing" on disk; "unexpected", on disk and not in the state; "reshaped"; "recast"; "other" if one is
            an array and the other a key or a plain value.
        path: Its names, the item first; the names on disk if it is unexpected.
        expected: The leaf of the state as a record; None if it is unexpected.
        stored: The leaf on disk as a record, after surgery; None if it is missing.
        text: The difference as a sentence that follows the leaf's name.
    """

    kind: Literal["missing", "unexpected", "reshaped", "recast", "other"]
    path: Names
    expected: Record | None = None
    stored: Record | None = None
    text: str = ""

    def __str__(self) -> str:
        return f"{'.'.join(self.path)}: {self.text}"


def compare(item: str, leaf: Leaf, stored: Record) -> Difference | None:
    """Return how a stored leaf differs from a leaf of the state; None if it fits.

    Args:
        item: Name of the item.
        leaf: The leaf of the state.
        stored: The leaf on disk.

    Raises:
        LeafError: If the leaf of the state is of a type that cannot be stored.
    """
    path = to_names((item, *leaf.path))
    if not is_array(leaf.value):
        # A template that contains an object is refused as a state would be.
        encode_value(format_leaf_name(item, leaf.path), leaf.value)
        # jit turns the numbers of a state into arrays: a fresh state has 0 where a trained one has int32[].
        is_number = isinstance(leaf.value, int | float | complex) and stored.kind == "array" and stored.shape == ()
        if stored.kind == "value" or is_number:
            return None
        return Difference(
            kind="other", path=path, stored=stored, text=f"{format_form(stored)} on disk, a plain value here"
        )
    here = describe(item, leaf)
    if stored.kind == "value":
        return Difference(
            kind="other", path=path, expected=here, text=f"a plain value on disk, {format_form(here)} here"
        )
    keys = here.kind == "key", stored.kind == "key"
    if keys[0] == keys[1] and (here.shape, here.dtype) == (stored.shape, stored.dtype):
        return None
    text = f"{format_form(stored)} on disk, {format_form(here)} here"
    if any(keys):
        return Difference(kind="other", path=path, expected=here, stored=stored, text=text)
    text += "; its axes are in another order" if is_transposed(stored.shape, here.shape) else ""
    kind: Literal["recast", "reshaped"] = "recast" if here.shape == stored.shape else "reshaped"
    return Difference(kind=kind, path=path, expected=here, stored=stored, text=text)


def is_transposed(stored: Sequence[int], expected: Sequence[int]) -> bool:
    """Whether two shapes differ only in the order of their axes: a block of a transposed array is meaningless."""
    return tuple(stored) != tuple(expected) and sorted(stored) == sorted(expected)


def mask_numbers(path: Names) -> Names:
    """Replace the numbers in a name by "#": the names of equal blocks differ only in their numbers."""
    return tuple(_DIGITS.sub("#", part) for part in path)


def add_closest_names(differences: Sequence[Difference]) -> list[Difference]:
    """Add to each missing leaf the closest names that are on disk and not in the state.

    Names are compared in pairs, so only the first `_MAX_KINDS` kinds of either side are compared.
    """
    unexpected = dict.fromkeys(each.path for each in differences if each.kind == "unexpected")
    if not unexpected:
        return list(differences)
    masked = {".".join(mask_numbers(path)): ".".join(path) for path in unexpected}
    names = {".".join(path) for path in unexpected}
    candidates = list(masked)[:_MAX_KINDS]
    asked: set[str] = set()

    @functools.cache
    def find_nearest(masked_name: str) -> tuple[str, ...]:
        if len(asked) >= _MAX_KINDS:
            return ()
        asked.add(masked_name)
        return tuple(difflib.get_close_matches(masked_name, candidates, n=3, cutoff=0.5))

    found = []
    for each in differences:
        if each.kind == "missing" and (near := find_nearest(".".join(mask_numbers(each.path)))):
            numbers = _DIGITS.findall(".".join(each.path))
            filled = [_fill_numbers(each_near, numbers) for each_near in near]
            shown = dict.fromkeys(name if name in names else masked[each_near] for each_near, name in zip(near, filled))
            each = dataclasses.replace(each, text=f"{each.text}; did you mean {', '.join(map(repr, shown))}?")
        found.append(each)
    return found


def _fill_numbers(masked_name: str, numbers: Sequence[str]) -> str:
    """Replace each "#" by the next number."""
    rest = iter(numbers)
    return re.sub("#", lambda _: next(rest, "#"), masked_name)


_MAX_KINDS = 200
_DIGITS = re.compile(r"\d+")
