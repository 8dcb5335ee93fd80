# SPDX-License-Identifier: Apache-2.0
"""The rules for an assignment, as a person would write them.

Sits on `space`. Rules have slices rather than lists of layers, and names without an index where all values of that name
are saved.
"""

import re
from collections.abc import Sequence
from typing import Any

from ...rules.paths import Path, format_path
from ...rules.policies import dropout_masks_saveable
from ...rules.rule import Remat
from ...rules.ruleset import Rules
from ..model.block_ilp import BlockProblem
from .assignments import Assignment
from .space import Space

_INDEXED = re.compile(r"(.*)\[\d+\]\Z", re.DOTALL)


def write_rules(space: Space, assignment: Assignment) -> Rules:
    """Return the rules of an assignment; none where no block is a region."""
    kinds = dict(space.outline.visits)
    methods = dict(space.outline.rules)
    groups: dict[Any, list[Path]] = {}
    for number, path in enumerate(space.members):
        choice = space.levels[assignment.get_level(number)][kinds[path]]
        pattern = _find_pattern(path, methods)
        saved = _write_saved(space.outline.problems[kinds[path]], choice.names, offload=assignment.offload)
        is_grouped = path[:-1] in space.groupable_paths or (assignment.nested and path in space.stacked_paths)
        group = assignment.group if number < assignment.split and is_grouped else 1
        groups.setdefault((pattern, saved, group), []).append(path)
    pairs: list[tuple[str, Any]] = []
    for (pattern, saved, group), paths in groups.items():
        if saved is not None:
            all_paths = [path for path in space.members if _find_pattern(path, methods) == pattern]
            nested = assignment.nested and group > 1
            action = Remat(methods=methods[pattern], group=group, nested=nested, **dict(saved))
            pairs.append((_format_pattern(pattern, paths, all_paths), action))
    return Rules(pairs)


def _write_saved(
    problem: BlockProblem, names: Sequence[str] | None, *, offload: bool
) -> tuple[tuple[str, Any], ...] | None:
    """Return the fields of an action that say what a block saves; None for a block without a region."""
    if names is None:
        return None
    if offload and problem.stacked:
        return (("offload", _shorten_names(problem, names)),)
    if problem.masks and set(problem.masks) <= set(names):
        others = [name for name in names if name not in problem.masks]
        return (("policy", dropout_masks_saveable), ("save", _shorten_names(problem, others)))
    return (("save", _shorten_names(problem, names)),)


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


def _shorten_names(problem: BlockProblem, names: Sequence[str]) -> tuple[str, ...]:
    """Return names in the program's order, without the index where every value of that name is saved."""
    all_names = [candidate.name for candidate in problem.graph.candidates]
    stems: dict[str, set[str]] = {}
    for name in all_names:
        stems.setdefault(_strip_index(name), set()).add(name)
    chosen = set(names)
    short = [
        _strip_index(name) if stems[_strip_index(name)] <= chosen else name for name in all_names if name in chosen
    ]
    return tuple(dict.fromkeys(short))


def _strip_index(name: str) -> str:
    found = _INDEXED.match(name)
    return found[1] if found else name
