# SPDX-License-Identifier: Apache-2.0
"""Patterns that match given leaves and no others."""

import re
from collections.abc import Collection, Iterable, Sequence

from ...tree.leaf_paths import Names
from ...tree.match import mask_numbers
from ..renaming import Parts


def find_covering_patterns(targets: Iterable[Names], others: Collection[Names]) -> list[str]:
    """Return patterns that match the targets and none of the others; a part with only targets gets one pattern.

    Args:
        targets: The leaves to match.
        others: All leaves that no pattern may match.
    """
    blocked = {other[:depth] for other in others for depth in range(1, len(other) + 1)}
    parts: dict[Names, None] = {}
    for path in targets:
        depth = next((depth for depth in range(1, len(path)) if path[:depth] not in blocked), len(path))
        parts[path[:depth]] = None
    return make_patterns(list(parts), others)


def make_patterns(paths: Sequence[Names], others: Iterable[Names]) -> list[str]:
    """Return patterns for names: one for each kind if it matches nothing else, otherwise one for each name.

    Args:
        paths: Leaves, or parts of which no leaf is among the others.
        others: All other leaves.
    """
    kinds: dict[Names, list[Names]] = {}
    for path in paths:
        kinds.setdefault(mask_numbers(path), []).append(path)
    if len(paths) == 1:
        return [format_pattern(paths[0])]
    parts = Parts([*others, *paths])
    last = {path[-1] for path in paths}
    if len(kinds) > 1 and len(last) == 1 and parts.match(name := format_segment(*last)) == set(paths):
        return [name]  # At any depth.
    patterns: list[str] = []
    for same in kinds.values():
        pattern = ".".join(_merge_segments(same))
        pattern = pattern if "." in pattern else f"{pattern}.**"
        if len(same) > 1 and parts.match(pattern) == set(same):
            patterns.append(pattern)
        else:
            patterns += map(format_pattern, same)
    return patterns


def format_pattern(path: Names) -> str:
    """Return a name as a pattern."""
    segments = list(map(format_segment, path))
    # A single segment would match that name at any depth.
    return ".".join(segments) if len(segments) > 1 else f"{segments[0]}.**"


def format_segment(segment: str) -> str:
    """Return a segment as one of a pattern; special characters become a star."""
    return re.sub(r"[#\[\]{}:.*\s]+", "*", segment)


def _merge_segments(paths: Sequence[Names]) -> list[str]:
    """Return the segments of a pattern for names that differ in numbers only."""
    merged = []
    for same in zip(*paths):
        text = same[0] if len(set(same)) == 1 else re.sub(r"\d+", "*", same[0])
        merged.append(format_segment(text))
    return merged
