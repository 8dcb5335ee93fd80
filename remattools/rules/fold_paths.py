# SPDX-License-Identifier: Apache-2.0
"""Fold paths that differ in indices only into one pattern: `layers.[0:32].attn`, `dec_{0,1,2}.mlp`.

Works on strings. An index is what `every_n` counts along: a number, or the number at the
end of a name. A folded path is a pattern that matches these paths and no others, so that
it can be pasted into a rule.
"""

import dataclasses
import re
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, ClassVar, Protocol

_INDEX = re.compile(r"\d+$")
_INDEX_IN_SENTENCE = re.compile(r"\d+(?=[.:,;\s]|$)")


def mask_path(path: str) -> tuple[str, ...]:
    """Return the segments of a path with "#" for each index; equal masks mean that the paths can be folded.

    Example:
        >>> mask_path("layers.3.attn")
        ('layers', '#', 'attn')
    """
    return tuple(_INDEX.sub("#", part) for part in path.split("."))


def mask_text(text: str, mark: str = "#") -> str:
    """Return a sentence with `mark` for each index in it."""
    return _INDEX_IN_SENTENCE.sub(mark, text)


def format_paths(paths: Sequence[str]) -> str:
    """Return one pattern for paths of equal mask; it matches these paths and no others.

    Example:
        >>> format_paths(["layers.0.attn", "layers.1.attn", "layers.2.attn"])
        'layers.[0:3].attn'
    """
    if len(paths) == 1:
        return paths[0]
    blocks = [tuple(frozenset({part}) for part in path.split(".")) for path in paths]
    for column in reversed(range(len(blocks[0]))):
        merged: dict[tuple[frozenset[str], ...], frozenset[str]] = {}
        for block in blocks:
            others = (*block[:column], *block[column + 1 :])
            merged[others] = merged.get(others, frozenset()) | block[column]
        blocks = [(*others[:column], values, *others[column:]) for others, values in merged.items()]
    return ", ".join(".".join(map(_format_indices, block)) for block in blocks)


class Row(Protocol):
    """A frozen dataclass that stands for one or several equal values of modules."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def path(self) -> str:
        """Path of the module, or a pattern for several."""

    @property
    def bytes(self) -> int:
        """Size of all values."""


def merge_rows[R: Row](
    rows: Iterable[R], get_key: Callable[[R], Hashable], **changes: Callable[[list[R]], Any]
) -> list[R]:
    """Return one row for rows whose paths differ in indices only, largest first.

    Args:
        rows: Rows with the fields `path`, `bytes` and `count`. A merged row has a pattern for the paths, the sum of the
            bytes and the number of rows.
        get_key: Returns what else must be equal.
        changes: Other values of a merged row's fields, each computed from the rows that it stands for.
    """
    groups: dict[Hashable, list[R]] = {}
    for row in rows:
        groups.setdefault((mask_path(row.path), get_key(row)), []).append(row)
    merged = []
    for group in groups.values():
        fields = {
            "path": format_paths(list(dict.fromkeys(row.path for row in group))),
            "bytes": sum(row.bytes for row in group),
            "count": len(group),
        }
        fields.update({name: change(group) for name, change in changes.items()})
        merged.append(dataclasses.replace(group[0], **fields))
    return sorted(merged, key=lambda row: -row.bytes)


def _format_indices(parts: frozenset[str]) -> str:
    """Return one segment of a folded path: a name or an index, a slice, or alternatives in braces."""
    if len(parts) == 1:
        return next(iter(parts))
    names = {_INDEX.sub("", part) for part in parts}
    if names != {""}:
        name = names.pop()
        indices = sorted((part[len(name) :] for part in parts), key=int)
        return f"{name}{{{','.join(indices)}}}"
    numbers = sorted(map(int, parts))
    step = numbers[1] - numbers[0]
    if numbers != list(range(numbers[0], numbers[-1] + 1, step)):
        return "{" + ",".join(map(str, numbers)) + "}"
    return f"[{numbers[0]}:{numbers[-1] + 1}{'' if step == 1 else f':{step}'}]"
