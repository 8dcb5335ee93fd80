# SPDX-License-Identifier: Apache-2.0
"""Does what is on disk fit the state that was passed in? Exactly, or a list of every difference.

No dtype is cast and no shape is bent here: an int32 template for float32 weights is a mistake, and Orbax's silent
truncation of it is one of the defects this package exists for.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..errors import StructureError, did_you_mean
from .leaves import Leaf, Path, Record, describe, dotted, encode_value, is_array
from .packing import unpack
from .tree import Flat

type Names = tuple[str, ...]
"""A path with all keys as strings: Orbax keeps no ints, so `0` and `"0"` are one key."""


def names(path: Path) -> Names:
    """The form in which paths are compared."""
    return tuple(map(str, path))


@dataclasses.dataclass(frozen=True)
class Pairing:
    """Which leaf on disk belongs to which leaf of the state passed in.

    Attributes:
        records: The record for each leaf of the template.
        differences: One line for each leaf that does not fit; empty if all do.
    """

    records: dict[Names, Record]
    differences: list[str]


def pair(item: str, template: Flat, records: Sequence[Record], skeletons: Iterable[Path]) -> Pairing:
    """Find the stored leaf for every leaf of one item.

    Args:
        item: Name of the item.
        template: The state passed in, flattened as a template.
        records: The item's leaves on disk.
        skeletons: Paths of the stateful objects on disk.
    """
    stateful = {names(root) for root in skeletons}
    lines = [
        f"{dotted(item, root)}: holds a state (get_state/set_state) here and none on disk"
        for root in template.skeletons
        if names(root) not in stateful
    ]
    stored = {names(record.path): record for record in records if not below(record.path, template.skeletons)}
    found: dict[Names, Record] = {}
    missing = []
    for leaf in template.leaves:
        # A state of nnx that plain Orbax wrote has the attribute `value` of each variable as a key of its own.
        known = next((key for key in (names(leaf.path), (*names(leaf.path), "value")) if key in stored), None)
        if known is None:
            missing.append(leaf.path)
        else:
            found[names(leaf.path)] = record = stored.pop(known)
            lines += _leaf_difference(item, leaf, record)
    unexpected = [dotted(item, record.path) for record in stored.values()]
    for path in missing:
        near = did_you_mean(dotted(item, path), unexpected) if unexpected else ""
        lines.append(f"{dotted(item, path)}: not on disk{'; ' + near if near.startswith('did') else ''}")
    lines += [f"{name}: on disk, not in the state passed in" for name in unexpected]
    return Pairing(found, lines)


def require_legal_skeletons(template: Flat, records: Sequence[Record], skeletons: Mapping[Path, Any]) -> None:
    """Take the stored containers of stateful objects together once, so that it cannot fail half way later on.

    Raises:
        CorruptStepError: If they cannot be rebuilt.
    """
    wanted = {names(root) for root in template.skeletons}
    for root, skeleton in skeletons.items():
        if names(root) in wanted:
            unpack(skeleton, [None for record in records if below(record.path, [root])])


def below(path: Path, roots: Iterable[Path]) -> bool:
    """Whether a leaf belongs to one of the objects at `roots`."""
    return any(names(path)[: len(root)] == names(root) for root in roots)


def _leaf_difference(item: str, leaf: Leaf, record: Record) -> list[str]:
    name = dotted(item, leaf.path)
    if not is_array(leaf.value):
        encode_value(name, leaf.value)  # A template with an object in it is refused like a state would be.
        # jit turns the numbers of a state into arrays: a fresh state has 0 where a trained one has int32[].
        number = isinstance(leaf.value, int | float | complex) and record.kind == "array" and record.shape == ()
        return [] if record.kind == "value" or number else [f"{name}: {_show(record)} on disk, a plain value here"]
    here = describe(item, leaf)
    if record.kind == "value":
        return [f"{name}: a plain value on disk, {_show(here)} here"]
    if (here.kind == "key", here.shape, here.dtype) == (record.kind == "key", record.shape, record.dtype):
        return []
    return [f"{name}: {_show(record)} on disk, {_show(here)} here"]


def _show(record: Record) -> str:
    prefix = "key " if record.kind == "key" else ""
    return f"{prefix}{record.dtype}[{','.join(map(str, record.shape))}]"


def require_match(step: int, lines: Sequence[str], *, most: int = 20) -> None:
    """Raise `StructureError` if there are differences; the message shows the first of them."""
    if not lines:
        return
    shown = [f"\n    {line}" for line in lines[:most]]
    rest = f"\n    ... and {len(lines) - most} more" if len(lines) > most else ""
    error = StructureError(
        what=f"step {step} does not fit the state passed in, in {len(lines)} place(s):{''.join(shown)}{rest}",
        why="restoring part of it, or casting, would change the model without a word. Nothing was restored or lost.",
        fix="build the state as it was when the step was saved, or leave the item out of the state.",
    )
    error.mismatches = tuple(lines)
    raise error


def absent_item(item: str, stored: Iterable[Any]) -> str:
    """The line for an item of the template that the step does not have at all."""
    return f"{item}: not on disk; the step has {', '.join(map(str, stored)) or 'no items'}"
