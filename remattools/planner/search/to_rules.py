# SPDX-License-Identifier: Apache-2.0
"""The rules for an assignment, as a person would write them.

Sits on `space`. Rules have slices rather than lists of layers, and the few names of `short_names`.
"""

from collections.abc import Sequence
from typing import Any

from ...rules.paths import Path, format_path
from ...rules.rule import Remat
from ...rules.ruleset import Rules
from .assignments import Assignment
from .space import Space


def write_rules(space: Space, assignment: Assignment) -> Rules:
    """Return the rules of an assignment; none where no block is a region."""
    kinds = dict(space.outline.visits)
    methods = dict(space.outline.rules)
    groups: dict[Any, list[Path]] = {}
    known: dict[str, list[tuple[str, ...]]] = {}
    for number, path in enumerate(space.members):
        choice = space.levels[assignment.get_level(number)][kinds[path]]
        pattern = _find_pattern(path, methods)
        names = choice.names
        if names is not None:
            block = space.block_names[kinds[path]]
            # What was written for another kind of block may mean the same for this one: then one rule serves both.
            same = (short for short in known.setdefault(pattern, []) if block.is_equal(short, names))
            names = next(same, None) or block.shorten(names)
            known[pattern] = list(dict.fromkeys((*known[pattern], names)))
        group = assignment.group if number < assignment.split and path[:-1] in space.groupable_paths else 1
        groups.setdefault((pattern, names, group), []).append(path)
    pairs: list[tuple[str, Any]] = []
    for (pattern, names, group), paths in groups.items():
        if names is not None:
            all_paths = [path for path in space.members if _find_pattern(path, methods) == pattern]
            stacked = space.outline.problems[kinds[paths[0]]].stacked
            saved: dict[str, Any] = {"offload" if assignment.offload and stacked else "save": names}
            action = Remat(methods=methods[pattern], group=group, **saved)
            pairs.append((_format_pattern(pattern, paths, all_paths), action))
    return Rules(pairs)


def _find_pattern(path: Path, methods: dict[str, tuple[str, ...]]) -> str:
    patterns = (format_path((*path[:n], "*", *path[n + 1 :])) for n in reversed(range(len(path))))
    return next((pattern for pattern in (format_path(path), *patterns) if pattern in methods), format_path(path))


def _format_pattern(pattern: str, paths: Sequence[Path], all_paths: Sequence[Path]) -> str:
    segments = pattern.split(".")
    if len(paths) == len(all_paths) or "*" not in segments:
        return pattern
    place = segments.index("*")
    chosen = _format_segment([path[place] for path in paths], [path[place] for path in all_paths])
    return ".".join([*segments[:place], chosen, *segments[place + 1 :]])


def _format_segment(chosen: Sequence[str | int], all_segments: Sequence[str | int]) -> str:
    numbers = [segment for segment in chosen if isinstance(segment, int)]
    if len(numbers) == len(chosen) and all(isinstance(segment, int) for segment in all_segments):
        return _format_slice(numbers, max(int(segment) for segment in all_segments) + 1)
    names = [str(segment) for segment in chosen]
    return names[0] if len(names) == 1 else "{" + ",".join(names) + "}"


def _format_slice(indices: list[int], length: int) -> str:
    """Return indices as a slice, if they are one; otherwise as alternatives."""
    start, step = indices[0], indices[1] - indices[0] if len(indices) > 1 else 1
    if indices == list(range(start, indices[-1] + 1, step)):
        if len(indices) == 1:
            return f"[{start}]" if start < length - 1 else "[-1]"
        stop = indices[-1] + 1 if indices[-1] + step < length else None
        left = "" if start == 0 or (start < step and start == 0) else str(start)
        return f"[{left}:{'' if stop is None else stop}{f':{step}' if step > 1 else ''}]"
    return "{" + ",".join(map(str, indices)) + "}"
