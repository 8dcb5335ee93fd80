# SPDX-License-Identifier: Apache-2.0
"""Does a stored leaf fit a leaf of the state that was passed in? Exactly, or the difference is told.

No dtype is cast and no shape is bent here: an int32 template for float32 weights is a mistake, and Orbax's silent
truncation of it is one of the defects this package exists for. What may be changed is declared (`state.surgery`).
"""

import dataclasses
import difflib
import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from .containers import unpack
from .flatten import FlatItem
from .leaves import Leaf, Path, Record, describe, encode_value, format_leaf_name, is_array

type Names = tuple[str, ...]
"""A path with all keys as strings: Orbax keeps no ints, so `0` and `"0"` are one key."""


def to_names(path: Path) -> Names:
    """The form in which paths are compared."""
    return tuple(map(str, path))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Difference:
    """One leaf that does not fit.

    Attributes:
        kind: What is wrong with it: "missing" on disk; "unexpected", on disk and not in the state; "reshaped";
            "recast"; "other" for a thing of another kind.
        path: Its names, the item first; the names on disk if it is unexpected.
        expected: The leaf of the state as a record; None if it is unexpected.
        stored: The leaf on disk as a record, after surgery; None if it is missing.
        text: What is wrong, in words, after the leaf's name.
    """

    kind: Literal["missing", "unexpected", "reshaped", "recast", "other"]
    path: Names
    expected: Record | None = None
    stored: Record | None = None
    text: str = ""

    def __str__(self) -> str:
        return f"{'.'.join(self.path)}: {self.text}"


def compare(item: str, leaf: Leaf, stored: Record) -> Difference | None:
    """How a stored leaf differs from a leaf of the state; None if it fits.

    Raises:
        LeafError: If the leaf of the state is nothing that could be stored.
    """
    path = to_names((item, *leaf.path))
    if not is_array(leaf.value):
        encode_value(
            format_leaf_name(item, leaf.path), leaf.value
        )  # A template with an object in it is refused like a state.
        # jit turns the numbers of a state into arrays: a fresh state has 0 where a trained one has int32[].
        number = isinstance(leaf.value, int | float | complex) and stored.kind == "array" and stored.shape == ()
        if stored.kind == "value" or number:
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
    """Whether two shapes differ in the order of their axes only: a block of a transposed array means nothing."""
    return tuple(stored) != tuple(expected) and sorted(stored) == sorted(expected)


def mask_numbers(path: Names) -> Names:
    """The kind of a name: equal blocks differ in their numbers only."""
    return tuple(_DIGITS.sub("#", part) for part in path)


def add_closest_names(differences: Sequence[Difference]) -> list[Difference]:
    """Missing leaves with the closest names that are on disk and not in the state."""
    unexpected = {each.path for each in differences if each.kind == "unexpected"}
    if not unexpected:
        return list(differences)
    kinds = {".".join(mask_numbers(path)): ".".join(path) for path in unexpected}
    known = {".".join(path) for path in unexpected}

    @functools.cache
    def find_nearest(kind: str) -> tuple[str, ...]:
        return tuple(difflib.get_close_matches(kind, kinds, n=3, cutoff=0.5))

    told = []
    for each in differences:
        if each.kind == "missing" and (near := find_nearest(".".join(mask_numbers(each.path)))):
            numbers = _DIGITS.findall(".".join(each.path))
            same = [_fill_numbers(kind, numbers) for kind in near]
            shown = dict.fromkeys(name if name in known else kinds[kind] for kind, name in zip(near, same))
            each = dataclasses.replace(each, text=f"{each.text}; did you mean {', '.join(map(repr, shown))}?")
        told.append(each)
    return told


def _fill_numbers(kind: str, numbers: Sequence[str]) -> str:
    """A kind of name with the numbers of another."""
    rest = iter(numbers)
    return re.sub("#", lambda _: next(rest, "#"), kind)


_DIGITS = re.compile(r"\d+")


def format_form(record: Record) -> str:
    """A leaf's dtype and shape as one reads them; for a plain value the word."""
    if record.kind == "value":
        return "a plain value"
    prefix = "key " if record.kind == "key" else ""
    return f"{prefix}{record.dtype}[{','.join(map(str, record.shape))}]"


def require_legal_skeletons(template: FlatItem, records: Sequence[Record], skeletons: Mapping[Path, Any]) -> None:
    """Take the stored containers of stateful objects together once, so that it cannot fail half way later on.

    Raises:
        CorruptStepError: If they cannot be rebuilt.
    """
    wanted = {to_names(root) for root in template.skeletons}
    for root, skeleton in skeletons.items():
        if to_names(root) in wanted:
            unpack(skeleton, [None for record in records if is_below(record.path, [root])])


def is_below(path: Path, roots: Iterable[Path]) -> bool:
    """Whether a leaf belongs to one of the objects at `roots`."""
    return any(to_names(path)[: len(root)] == to_names(root) for root in roots)
