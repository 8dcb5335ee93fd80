# SPDX-License-Identifier: Apache-2.0
"""Write traces as few operations: whole parts instead of leaves, one pattern for all layers.

Joins and splits come first, then renames, each after the one that frees its new name, then copies.
"""

import collections
import dataclasses
import re
from collections.abc import Collection, Iterable, Mapping, Sequence

from ...spec.operations import Copy, Merge, Operation, Rename, Split, Stack, Unstack
from ...tree.leaf_paths import Names
from ..renaming import Parts, find_outermost_depth
from .kinds import PLACE, mask_path
from .patterns import format_segment
from .tracing import Trace

type Change = tuple[Names, Names]
"""The old and the new name of a part."""

MAX_OPERATIONS = 200
"""A longer list is not suggested: nobody would read it."""
_NUMBER = re.compile(r"\d+")


class TooManyOperationsError(Exception):
    """The list of operations is too long to be read; caught within this room."""


@dataclasses.dataclass(frozen=True)
class _Group:
    """Changes that one operation makes.

    Attributes:
        old: The old name, as segments of a pattern; `PLACE` stands for the joined parts.
        new: The new name; `PLACE` stands for the pieces.
        parts: The parts on disk that it renames.
        leaves: The leaves on disk that it moves.
        targets: Their new names.
        anywhere: Whether the names are single segments at any depth.
    """

    old: Names
    new: Names
    parts: frozenset[Names]
    leaves: frozenset[Names]
    targets: frozenset[Names]
    anywhere: bool = False

    def write_old(self, place: str = "*") -> str:
        """Return the old name as a pattern."""
        return self._write(self.old, place)

    def write_new(self, place: str = "*") -> str:
        """Return the new name."""
        return self._write(self.new, place)

    def _write(self, segments: Names, place: str) -> str:
        text = ".".join(segments).replace(PLACE, place)
        # A single segment would match that name at any depth.
        is_bare = not self.anywhere and 1 in (len(self.old), len(self.new))
        return f"{text}.**" if is_bare else text


def write_moves(traces: Sequence[Trace], stored_names: Iterable[Names], *, allow_parts: bool) -> list[Operation]:
    """Return the operations that give stored leaves their new names.

    Args:
        traces: Where the leaves come from.
        stored_names: All leaves on disk that are not dropped.
        allow_parts: Whether whole parts may be renamed, and not only leaves.
    """
    found: list[Operation] = []
    names = set(stored_names)
    joins: dict[tuple[object, ...], list[Trace]] = {}
    for trace in traces:
        if trace.how not in ("rename", "copy"):
            joins.setdefault((trace.how, trace.axis, trace.pieces, trace.sizes), []).append(trace)
    for same in joins.values():
        found += [_write_join(same[0], group) for group in _group(same, names, allow_parts=allow_parts)]
        names -= {path for trace in same for path in trace.sources}
        names |= {path for trace in same for path in trace.targets}
    renames = [trace for trace in traces if trace.how == "rename" and trace.old != trace.new]
    found += _order_renames(_group(renames, names, allow_parts=allow_parts))
    names = (names - {trace.old for trace in renames}) | {trace.new for trace in renames}
    copies: dict[Names, list[Trace]] = {}
    for trace in traces:
        if trace.how == "copy":
            copies.setdefault(trace.old, []).append(dataclasses.replace(trace, sources=(trace.old,)))
    while copies:
        layer = [several.pop() for several in copies.values()]
        copies = {old: several for old, several in copies.items() if several}
        groups = _group(layer, names, allow_parts=allow_parts)
        found += [Copy(group.write_old(), group.write_new()) for group in groups]
    return found


def _write_join(trace: Trace, group: _Group) -> Operation:
    braces = "{" + ",".join(trace.pieces) + "}"
    if trace.how == "stack":
        return Stack(group.write_old(), group.write_new(), axis=trace.axis)
    if trace.how == "unstack":
        return Unstack(group.write_old(), group.write_new(), axis=trace.axis)
    if trace.how == "merge":
        return Merge(group.write_old(braces), group.write_new(), axis=trace.axis)
    return Split(group.write_old(), group.write_new(braces), axis=trace.axis, sizes=trace.sizes)


def _group(traces: Sequence[Trace], names: Collection[Names], *, allow_parts: bool) -> list[_Group]:
    """Return the changes that traces of one sort amount to, the deepest first."""
    by_name = {trace.old: trace for trace in traces}
    place = "{" + ",".join(traces[0].pieces) + "}" if traces and traces[0].pieces else "*"
    used = {path for trace in traces for path in trace.sources}
    staying = [path for path in names if path not in used]
    mapping = {old: trace.new for old, trace in by_name.items()}
    changes = _merge_parts(mapping, staying) if allow_parts else mapping
    moved: dict[Change, list[Trace]] = {}
    for old, trace in by_name.items():
        depth = next(depth for depth in range(len(old), 0, -1) if old[:depth] in changes)
        moved.setdefault((old[:depth], changes[old[:depth]]), []).append(trace)
    masked: dict[tuple[Names, ...], list[Change]] = {}
    for old, new in moved:
        is_alike = _NUMBER.findall(".".join(old)) == _NUMBER.findall(".".join(new))
        masked.setdefault((mask_path(old), mask_path(new)) if is_alike else (old, new), []).append((old, new))
    parts = Parts(names) if any(len(same) > 1 for same in masked.values()) or len(masked) > 1 else None
    found: list[_Group] = []
    for same in masked.values():
        together = _make_group(same, moved)
        if len(same) > 1 and parts is not None and _is_exact(together, parts, place):
            found.append(together)
        else:
            found += [_make_group([change], moved) for change in same]
    if len(found) > MAX_OPERATIONS:
        raise TooManyOperationsError
    found = _say_at_any_depth(found, parts, place) if parts is not None else found
    return sorted(found, key=lambda group: -len(group.old))


def _merge_parts(mapping: Mapping[Names, Names], staying: Iterable[Names]) -> dict[Names, Names]:
    """Return changes of whole parts that do to leaves what `mapping` says.

    A part whose leaves move in several ways moves as most of its children do; the others leave it before.
    """
    moves: dict[Names, Names | None] = {path: path for path in staying}
    moves |= mapping
    children: dict[Names, list[Names]] = {}
    seen = set[Names]()
    for path in moves:
        for depth in range(len(path), 1, -1):
            if path[:depth] in seen:
                break
            seen.add(path[:depth])
            children.setdefault(path[: depth - 1], []).append(path[:depth])
    exceptions: dict[Names, list[Change]] = {}
    for node in sorted(children, key=len, reverse=True):
        moves[node], exceptions[node] = _move_part(node, children[node], moves, exceptions)
    found: dict[Names, Names] = {}
    pending: list[Names] = [path for path in moves if len(path) == 1]
    while pending:
        node = pending.pop()
        new = moves[node]
        if new is None:
            pending += children[node]
        else:
            found |= dict(exceptions.get(node, []))
            if new != node:
                found[node] = new
    return found


def _move_part(
    node: Names,
    children: Sequence[Names],
    moves: Mapping[Names, Names | None],
    exceptions: Mapping[Names, list[Change]],
) -> tuple[Names | None, list[Change]]:
    """Return where a part goes as a whole, and the changes that come before; None if it has to be taken apart."""
    bases = collections.Counter[Names]()
    for child in children:
        new = moves[child]
        if new is None:
            return None, []
        if len(new) > 1 and new[-1] == child[-1] and PLACE not in child[-1]:
            bases[new[:-1]] += 1
    # What stays cannot be an exception.
    base = node if node in bases else max(bases, key=lambda each: bases[each], default=None)
    if base is None or (base != node and 2 * bases[base] < len(children)):
        return None, []
    others: list[Change] = []
    for child in children:
        new = moves[child]
        if new is not None and new != (*base, child[-1]):
            others.append((child, new))
        others += exceptions.get(child, [])
    if base != node and any(new[: len(node)] == node for _, new in others):
        return None, []
    return base, others


def _make_group(changes: Sequence[Change], moved: Mapping[Change, Sequence[Trace]]) -> _Group:
    """Return several changes of one form as one; numbers that differ between them become a star."""
    traces = [trace for change in changes for trace in moved[change]]
    return _Group(
        _write_segments([old for old, _ in changes]),
        _write_segments([new for _, new in changes]),
        frozenset(old for old, _ in changes),
        frozenset(path for trace in traces for path in trace.sources),
        frozenset(path for trace in traces for path in trace.targets),
    )


def _write_segments(paths: Sequence[Names]) -> Names:
    segments: list[str] = []
    for same in zip(*paths):
        words = list(same)
        if len(set(words)) > 1:
            words = [_NUMBER.sub("*", words[0])]
        segments.append(format_segment(words[0]))
    return tuple(segments)


def _is_exact(group: _Group, parts: Parts, place: str) -> bool:
    """Return whether a pattern matches the leaves of a group and no others, and counts what it joins last."""
    for side in (group.old, group.new):
        text = ".".join(side)
        if PLACE in text and "*" in text.rpartition(PLACE)[2]:
            return False
    matched = parts.match(group.write_old(place))
    return {leaf for leaf in parts.leaves if find_outermost_depth(leaf, matched)} == group.leaves


def _say_at_any_depth(groups: Sequence[_Group], parts: Parts, place: str) -> list[_Group]:
    """Say the same change in several parts, such as a model and the optimizer's copies of it, as one pattern."""
    cores: dict[Change, list[_Group]] = {}
    for group in groups:
        common = 0
        while common < min(len(group.old), len(group.new)) - 1 and group.old[common] == group.new[common]:
            common += 1
        cores.setdefault((group.old[common:], group.new[common:]), []).append(group)
    found: list[_Group] = []
    for (old, new), same in cores.items():
        leaves = frozenset().union(*(group.leaves for group in same))
        targets = frozenset().union(*(group.targets for group in same))
        is_plain = len(old) == len(new) == 1 and not set("*" + PLACE) & set(old[0] + new[0])
        parts_of = frozenset().union(*(group.parts for group in same))
        sides = (old, new) if is_plain else (("**", *old), ("**", *new))
        together = _Group(*sides, parts_of, leaves, targets, anywhere=is_plain)
        found += [together] if len(same) > 1 and _is_exact(together, parts, place) else same
    return found


def _order_renames(groups: Sequence[_Group]) -> list[Operation]:
    """Return renames in an order in which each new name is free, and parts are left before they are renamed."""
    owner = {leaf: index for index, group in enumerate(groups) for leaf in group.leaves}
    above = {part: index for index, group in enumerate(groups) for part in group.parts}
    before: dict[int, set[int]] = {index: set() for index in range(len(groups))}
    for index, group in enumerate(groups):
        before[index] |= {owner[path] for path in group.targets if path in owner and owner[path] != index}
    for leaf, index in owner.items():
        for depth in range(1, len(leaf)):
            other = above.get(leaf[:depth], index)
            if other != index:
                before[other].add(index)
    found: list[Operation] = []
    last: list[Operation] = []
    left = list(before)
    while left:
        free = [index for index in left if not before[index] & set(left)]
        if not free:
            # A circle: one of them makes room and takes its new name in the end.
            index, free = left[0], []
            old, new = groups[index].write_old(), groups[index].write_new()
            head, dot, rest = old.partition(".")
            found.append(Rename(old, f"{head}_moved{dot}{rest}"))
            last.append(Rename(f"{head}_moved{dot}{rest}", new))
            left.remove(index)
        for index in free:
            found.append(Rename(groups[index].write_old(), groups[index].write_new()))
            left.remove(index)
    return [*found, *last]
