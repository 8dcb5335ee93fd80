# SPDX-License-Identifier: Apache-2.0
"""Rename leaves: which parts of a state a pattern matches, and which names a `Rename` gives them.

A pattern that matches a part of the state applies to everything below it. If several parts above a leaf match, the
outermost counts, so that each leaf is renamed at one place.
"""

import functools
import re
from collections.abc import Iterable

from remattools.rules.paths import PathIndex, Pattern, make_natural_key

from ..spec.operations import WILDCARD, Copy, Merge, Rename, Split, Stack, Unstack, find_wildcards, split_segments
from ..tree.leaf_paths import Names

_MARK = "\x1f"
"""Precedes every segment in the string that the regex matches."""


class Parts:
    """The leaves of a state and all nodes above them, by name."""

    def __init__(self, leaves: Iterable[Names]) -> None:
        self.leaves = list(leaves)
        nodes = {leaf[:depth]: None for leaf in self.leaves for depth in range(1, len(leaf) + 1)}
        self._nodes = list(nodes)
        # Orbax turns ints into strings, but slices select integers.
        self.paths = [tuple(int(part) if part.isdecimal() else part for part in node) for node in self._nodes]
        self._universe = PathIndex(self.paths)

    def match(self, pattern: str) -> frozenset[Names]:
        """Return the parts that a pattern matches."""
        return frozenset(self._nodes[index] for index in self._universe.match(Pattern.parse(pattern)))


def find_outermost_depth(leaf: Names, parts: frozenset[Names]) -> int:
    """Return how many segments of `leaf` name the outermost of `parts` that holds it; 0 if none does."""
    return next((depth for depth in range(1, len(leaf) + 1) if leaf[:depth] in parts), 0)


type Renaming = Rename | Copy | Stack | Merge | Unstack | Split
"""Operations that give leaves new names."""


def rename_leaf(operation: Rename | Copy, leaf: Names, matches: frozenset[Names]) -> Names:
    """Return a leaf's name after a `Rename`; unchanged if the pattern matches no part above it.

    Args:
        operation: The rename.
        leaf: The leaf's name.
        matches: The parts of the state that the operation's pattern matches.
    """
    depth = find_outermost_depth(leaf, matches)
    return (*rename_part(operation, leaf[:depth]), *leaf[depth:]) if depth else leaf


def rename_part(operation: Renaming, part: Names, piece: str = "") -> Names:
    """Return the new name of a part that the operation's pattern matches.

    Args:
        operation: The operation.
        part: The part.
        piece: What the last wildcard of the new name stands for, if the pattern has none in its place.
    """
    groups = iter([*_match_wildcards(operation.pattern, part), piece.replace(".", _MARK)])
    text = next(groups)
    for segment in split_segments(operation.new):
        if segment == "**":
            text += next(groups)
        else:
            text += _MARK + WILDCARD.sub(lambda _: next(groups), segment)
    return tuple(text.split(_MARK)[1:])


def get_joined_place(operation: Stack | Merge, part: Names) -> tuple[object, ...]:
    """Return a sort key: the place of a part among those that the last wildcard of a pattern lists."""
    found, wildcard = _match_wildcards(operation.pattern, part)[-1], find_wildcards(operation.pattern)[-1]
    names = wildcard[1:-1].split(",") if wildcard.startswith("{") else []
    name = found.replace(_MARK, ".")
    return (names.index(name),) if name in names else make_natural_key((name,))


def _match_wildcards(pattern: str, part: Names) -> list[str]:
    """Return the prefix of a pattern without a dot, and what each wildcard matched."""
    found = _compile_pattern(pattern).fullmatch("".join(_MARK + segment for segment in part))
    assert found is not None  # The regex is never stricter than the pattern: a slice matches any segment.
    return [group or "" for group in found.groups()]


@functools.lru_cache(maxsize=1024)
def _compile_pattern(pattern: str) -> re.Pattern[str]:
    """Return a regex: group 1 is the prefix of a pattern without a dot, the other groups are its wildcards."""
    segments = split_segments(pattern)
    free = len(segments) == 1 and segments != ["**"]
    text = f"((?:{_MARK}[^{_MARK}]*)*?)" if free else "()"
    for segment in segments:
        if segment == "**":
            text += f"((?:{_MARK}[^{_MARK}]*)*?)"
        else:
            text += _MARK + _translate_segment(segment)
    return re.compile(text)


def _translate_segment(segment: str) -> str:
    text, end = "", 0
    for found in WILDCARD.finditer(segment):
        text += re.escape(segment[end : found.start()])
        end = found.end()
        if found[0].startswith("{"):
            text += "(" + "|".join(map(_translate_alternative, found[0][1:-1].split(","))) + ")"
        else:
            text += f"([^{_MARK}]*)"
    return text + re.escape(segment[end:])


def _translate_alternative(text: str) -> str:
    return re.escape(text).replace(r"\*", f"[^{_MARK}]*").replace(r"\.", _MARK)
