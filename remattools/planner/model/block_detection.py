# SPDX-License-Identifier: Apache-2.0
"""Which modules of a model are blocks: the units for which a plan chooses what is saved.

Blocks are members of lists and dicts, and modules that a scan calls (stacked layers, which only the traced program
shows). Where a model has neither, its direct children are the blocks.
"""

import functools
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from ...jaxpr import jaxprs
from ...rules.paths import Path, format_path
from ...transform import swap
from ...transform.capture import walk as cap
from ...transform.derive import get_base_class
from ...transform.modules import ModuleEntry, find_modules
from ...transform.naming import scopes
from .block_primitive import BLOCK_PRIMITIVE

# Blocks inside a module replace the module if they hold at least this share of its parameters.
_MIN_INNER_SHARE = 0.9

BlockPattern = tuple[str, tuple[str, ...]]


def find_blocks(model: Any, loop_paths: Iterable[Path] = ()) -> list[BlockPattern]:
    """Return the patterns of the blocks, each with the methods that are regions.

    Args:
        model: An nnx model, real or abstract.
        loop_paths: Paths of modules that a loop calls, from `find_loop_modules`.
    """
    entries = find_modules(model)
    found = _refine_blocks(entries, find_members(model), loop_paths)
    return found or [
        (format_path(entry.path), (str(_find_method(entry.module)),))
        for entry in entries
        if len(entry.path) == 1 and not entry.container and _find_method(entry.module) is not None
    ]


def find_members(model: Any) -> list[BlockPattern]:
    """Return patterns of the members of lists and dicts that are not inside another block.

    A list may hold lists or dicts; each of these is a separate sequence of blocks.
    """
    entries = find_modules(model)
    owners = {entry.path for entry in entries if not entry.container}
    blocks: set[Path] = set()
    holders: dict[Path, set[str | None]] = {}
    for entry in entries:
        path = entry.path
        if entry.container or not path or any(path[:n] in blocks for n in range(len(path))):
            continue
        # An attribute is a part of its module; only members of a list or a dict are blocks.
        owner = max((n for n in range(len(path)) if path[:n] in owners), default=-1 if entries[0].path == () else 0)
        if len(path) - owner < 2:
            continue
        method = _find_method(entry.module)
        holders.setdefault(path[:-1], set()).add(method)
        if method is not None:
            blocks.add(path)
    return [
        (format_path((*holder, "*")), (str(next(iter(methods))),))
        for holder, methods in holders.items()
        if len(methods) == 1 and None not in methods
    ]


def find_loop_modules(jaxpr: Any) -> set[Path]:
    """Return the outermost modules that each scan of a jaxpr calls, inner scans included."""
    return set(_walk_loop_calls(jaxpr, False, None, ()))


def _walk_loop_calls(jaxpr: Any, in_loop: bool, outermost: Path | None, prefix: Path) -> Iterator[Path]:
    for equation in jaxprs.open_jaxpr(jaxpr).eqns:
        found = outermost
        if in_loop and found is None:
            found = next(((*prefix, *path) for path in scopes.find_paths(str(equation.source_info.name_stack))), None)
        if found:  # the root's path is empty: a loop around the root, such as one over microbatches, is not over layers
            yield found
        if equation.primitive is BLOCK_PRIMITIVE:
            block = equation.params["block"]
            if in_loop and found is None:
                yield block.path
            yield from _walk_loop_calls(block.jaxpr, False, None, block.path)
        is_scan = equation.primitive.name == "scan"
        for _, below in jaxprs.find_subjaxprs(equation):
            yield from _walk_loop_calls(below, in_loop or is_scan, None if is_scan else found, prefix)


def _refine_blocks(
    entries: list[ModuleEntry], patterns: list[BlockPattern], loop_paths: Iterable[Path]
) -> list[BlockPattern]:
    """Return the blocks of lists and those that loops call; of nested ones either the outer or the inner blocks."""
    by_path = {entry.path: entry for entry in entries}
    calls = [p for p in loop_paths if p in by_path and not by_path[p].container and _find_method(by_path[p].module)]
    listed = {path: pattern for pattern in patterns for path in by_path if _is_member(pattern[0], path)}
    chosen = set(listed) | set(calls)
    for path in sorted(chosen, key=len):
        inner = {other for other in chosen if len(other) > len(path) and other[: len(path)] == path}
        if path not in chosen or not inner:
            continue
        share = sum(_count_parameters(by_path[other]) for other in inner) / max(_count_parameters(by_path[path]), 1)
        chosen -= {path} if share >= _MIN_INNER_SHARE else inner
    whole = [p for p in patterns if all(path in chosen for path, pattern in listed.items() if pattern == p)]
    alone = [path for path in by_path if path in chosen and listed.get(path) not in whole]
    found = {text: _find_method(by_path[path].module) for text, path in _merge_paths(alone, listed).items()}
    return [*whole, *((text, (str(method),)) for text, method in found.items())]


def _merge_paths(paths: list[Path], member_paths: Iterable[Path]) -> dict[str, Path]:
    """Return patterns with one path of each; modules at the same place in all members of a list share a pattern."""
    members: dict[Path, set[Path]] = {}
    for path in member_paths:
        members.setdefault(path[:-1], set()).add(path)
    found: dict[str, Path] = {}
    for path in paths:
        holder = next((holder for holder in members if path[: len(holder)] == holder), None)
        text = format_path(path)
        if holder is not None:
            rest = path[len(holder) + 1 :]
            if all((*member, *rest) in paths for member in members[holder]):
                text = format_path((*holder, "*", *rest))
        found.setdefault(text, path)
    return found


def _is_member(pattern: str, path: Path) -> bool:
    return bool(path) and pattern == format_path((*path[:-1], "*"))


def _count_parameters(entry: ModuleEntry) -> int:
    return sum(int(np.prod(leaf.shape)) for leaf in cap.capture(entry.module).leaves)


def _find_method(module: Any) -> str | None:
    return _find_class_method(get_base_class(type(module)))


@functools.lru_cache(maxsize=4096)
def _find_class_method(cls: type) -> str | None:
    methods = list(swap.find_methods(cls))
    if "__call__" in methods:
        return "__call__"
    return methods[0] if len(methods) == 1 else None
