# SPDX-License-Identifier: Apache-2.0
"""Names of leaves in safetensors files: renaming, skipping, and the metadata that keys and plain values need.

The format has arrays and string metadata only. A typed key is stored as its key data and a plain value as a string of
JSON. Metadata under `KEY` and `VALUE` says so, and an import restores both; other readers ignore it.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence

from remattools.rules.paths import Pattern

from ..errors import SpecError, StructureError, suggest_names
from ..tree.records import Record, decode_value

type NameMap = Mapping[str, str]
"""From a leaf's path to a tensor's name; a `*` stands for one segment and `**` for any number, on both sides."""

KEY, VALUE = "ckpttools.key.", "ckpttools.value."


def format_tensor_name(item: str, record: Record) -> str:
    """Return a leaf's path as a string, preceded by the item if there is one."""
    return ".".join([*([item] if item else []), *map(str, record.path)])


def exclude_skipped(records: Iterable[Record], skip: Sequence[str]) -> tuple[Record, ...]:
    """Return the leaves that no pattern of `skip` matches.

    Raises:
        SpecError: If a pattern matches no leaf.
    """
    given, left = (skip,) if isinstance(skip, str) else tuple(skip), tuple(records)
    for text in given:
        pattern = Pattern.parse(text)
        skipped = {record.path for record in left if pattern.is_match(record.path)}
        if not skipped:
            raise SpecError(
                what=f"skip={text!r} matches no leaf.",
                why="a mistyped pattern would silently leave nothing out.",
                fix=suggest_names(text, [format_tensor_name("", record) for record in left]),
            )
        left = tuple(record for record in left if record.path not in skipped)
    return left


def name_leaves(records: Iterable[Record], names: NameMap | None) -> dict[str, Record]:
    """Return leaves by the names of their tensors."""
    rules = [(_compile_pattern(pattern), pattern, target) for pattern, target in (names or {}).items()]
    unused = {pattern for _, pattern, _ in rules}
    found: dict[str, Record] = {}
    for record in records:
        name = format_tensor_name("", record) or "value"
        for regex, pattern, target in rules:
            if match := regex.fullmatch(name):
                unused.discard(pattern)
                name = _substitute(pattern, target, match)
                break
        if name in found:
            raise StructureError(
                what=f"two leaves have the name {name!r}: {format_tensor_name('', found[name])} and "
                f"{format_tensor_name('', record)}.",
                why="a file holds one tensor under each name.",
                fix="rename one of them with names={...}.",
            )
        found[name] = record
    if unused:
        raise SpecError(
            what=f"names has {', '.join(map(repr, sorted(unused)))}, which match no leaf.",
            why="a mistyped name would silently leave its leaf under the old one.",
            fix=suggest_names(min(unused), [format_tensor_name("", record) for record in found.values()]),
        )
    return found


def _compile_pattern(pattern: str) -> re.Pattern[str]:
    parts = re.split(r"(\*\*|\*)", pattern)
    return re.compile("".join({"*": r"([^.]*)", "**": r"(.*)"}.get(part, re.escape(part)) for part in parts))


def _substitute(pattern: str, target: str, match: re.Match[str]) -> str:
    parts = re.split(r"\*\*|\*", target)
    if len(parts) - 1 != len(match.groups()):
        raise SpecError(
            what=f"names={{{pattern!r}: {target!r}}} has {len(match.groups())} and {len(parts) - 1} stars.",
            why="each star on the right stands for what the star in its place on the left matched.",
            fix="write as many stars on both sides.",
        )
    return "".join(part for pair in zip(parts, (*match.groups(), "")) for part in pair)


def read_value(name: str, record: Record, metadata: Mapping[str, str]) -> tuple[Record, str | None]:
    """Return a plain value from the file's metadata; foreign files have none, and the state keeps its own."""
    text = metadata.get(VALUE + name)
    if text is None:
        return record, None
    try:
        encoded = json.loads(text)
        decode_value(encoded)
    except (ValueError, RecursionError) as error:
        return record, f"{name}: the value in the file cannot be read ({error})"
    return Record(path=record.path, kind="value", value=encoded), None
