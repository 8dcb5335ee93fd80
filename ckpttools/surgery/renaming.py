# SPDX-License-Identifier: Apache-2.0
"""Names under patterns: which parts of a state a pattern means, and what a `Rename` makes of them.

A pattern that matches a part of the state means everything below it. Of several such parts on the way to a leaf the
outermost counts, so that every leaf is renamed at one place.
"""

import functools
import re
from collections.abc import Iterable

from remattools.rules.paths import PathIndex, Pattern

from ..spec.operations import WILDCARD, Rename, split_segments
from ..tree.leaf_paths import Names

_MARK = "\x1f"
"""Stands before every segment in the text that a regex sees."""


class Parts:
    """All parts of some states by name, leaves and what lies above them."""

    def __init__(self, leaves: Iterable[Names]) -> None:
        self.leaves = list(leaves)
        nodes = {leaf[:depth]: None for leaf in self.leaves for depth in range(1, len(leaf) + 1)}
        self._nodes = list(nodes)
        # Orbax keeps no ints, and slices pick integers.
        self.paths = [tuple(int(part) if part.isdecimal() else part for part in node) for node in self._nodes]
        self._universe = PathIndex(self.paths)

    def match(self, pattern: str) -> frozenset[Names]:
        """The parts that a pattern matches."""
        return frozenset(self._nodes[index] for index in self._universe.match(Pattern.parse(pattern)))


def find_outermost_depth(leaf: Names, parts: frozenset[Names]) -> int:
    """How many segments of `leaf` the outermost of the parts above it (or itself) takes; 0 if there is none."""
    return next((depth for depth in range(1, len(leaf) + 1) if leaf[:depth] in parts), 0)


def rename_part(operation: Rename, part: Names) -> Names:
    """The new name of a part that the operation's pattern matches."""
    regex = _compile_pattern(operation.pattern)
    found = regex.fullmatch("".join(_MARK + segment for segment in part))
    assert found is not None  # It says no more than the pattern: of a slice only that there is a segment.
    taken = iter(found.groups()[1:])
    text = found[1]
    for segment in split_segments(operation.new):
        if segment == "**":
            text += next(taken)
        else:
            text += _MARK + WILDCARD.sub(lambda _: next(taken), segment)
    return tuple(text.split(_MARK)[1:])


@functools.lru_cache(maxsize=1024)
def _compile_pattern(pattern: str) -> re.Pattern[str]:
    """A regex whose first group is what stands before a pattern without a dot, and the others its wildcards."""
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
