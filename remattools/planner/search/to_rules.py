# SPDX-License-Identifier: Apache-2.0
"""The rules for an assignment, as a person would write them.

Sits on `space`. Rules have slices rather than lists of layers, and the few names of `short_names`.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

from ...rules.paths import Path, format_path
from ...rules.policies import dropout_masks_saveable
from ...rules.rule import Remat
from ...rules.ruleset import Rules
from ..model.block_ilp import BlockProblem
from .assignments import Assignment
from .short_names import BlockNames
from .space import Space

type _Shorten = Callable[[tuple[str, ...]], tuple[str, ...]]


def write_rules(space: Space, assignment: Assignment) -> Rules:
    """Return the rules of an assignment; none where no block is a region."""
    kinds = dict(space.outline.visits)
    methods = dict(space.outline.rules)
    groups: dict[Any, list[Path]] = {}
    known: dict[str, list[tuple[str, ...]]] = {}
    for number, path in enumerate(space.members):
        choice = space.levels[assignment.get_level(number)][kinds[path]]
        pattern = _find_pattern(path, methods)
        problem, block = space.outline.problems[kinds[path]], space.block_names[kinds[path]]
        shorten = functools.partial(_shorten_names, block, known.setdefault(pattern, []))
        saved = _write_saved(problem, choice.names, shorten, offload=assignment.offload)
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
    problem: BlockProblem, names: tuple[str, ...] | None, shorten: _Shorten, *, offload: bool
) -> tuple[tuple[str, Any], ...] | None:
    """Return the fields of an action that say what a block saves; None for a block without a region."""
    if names is None:
        return None
    if offload and problem.stacked:
        return (("offload", shorten(names)),)
    if problem.masks and set(problem.masks) <= set(names):
        others = tuple(name for name in names if name not in problem.masks)
        return (("policy", dropout_masks_saveable), ("save", shorten(others)))
    return (("save", shorten(names)),)


def _shorten_names(block: BlockNames, known: list[tuple[str, ...]], names: tuple[str, ...]) -> tuple[str, ...]:
    """Return few names for a block; those known from another kind of block if they mean the same: one rule for both."""
    short = next((each for each in known if block.is_equal(each, names)), None) or block.abbreviate(names)
    if short not in known:
        known.append(short)
    return short


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
