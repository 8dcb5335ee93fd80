# SPDX-License-Identifier: Apache-2.0
"""Which stored leaf goes to which leaf of the state, and what is done to it on the way.

First a plan, made from names, shapes and dtypes alone: it finds every difference and is all that a dry run needs.
Then only the leaves that the plan names are read and proved, and the arrays are changed on the host. Without surgery
the plan pairs equal names, and whatever does not fit is a difference.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, Protocol

import jax
import numpy as np

from remattools.rules.paths import find_closest

from ..errors import StructureError
from ..spec.operations import Cast, Drop, Operation, Reinit, Rename, as_code, find_wildcards, split_segments
from ..spec.surgery import Surgery
from ..tree.flatten import FlatItem
from ..tree.leaf_paths import Names, Path, is_below, to_names
from ..tree.leaves import Leaf, describe, is_array
from ..tree.match import Difference, add_closest_names, compare
from ..tree.records import Record, read_inline_array
from ..tree.write_back import HostItem
from . import array_operations
from .renaming import Parts, find_outermost_depth, rename_part


class StoredItem(Protocol):
    """One item of a step, as its manifest describes it."""

    @property
    def records(self) -> tuple[Record, ...]:
        """Its leaves."""

    @property
    def skeletons(self) -> Mapping[Path, Any]:
        """The containers of its stateful objects."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Changes:
    """What may be done to stored leaves so that they fit.

    Attributes:
        migrations: Surgery from older versions of the state, in order; what it does not find is passed over.
        surgery: Surgery that was asked for; each operation has to find something.
        only: Patterns of the leaves that are restored; all others keep their values. Empty for all.
    """

    migrations: tuple[Surgery, ...] = ()
    surgery: Surgery = dataclasses.field(default_factory=Surgery)
    only: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceLeaf:
    """One leaf on disk.

    Attributes:
        path: Its name now, the item first.
        item: The item that it is stored under.
        record: The leaf as it is stored.
        dtype: Its dtype after the casts.
        operations: What is to be done to its array.
        opaque: Whether it belongs to an object with `get_state`, whose leaves are its own affair.
    """

    path: Names
    item: str
    record: Record
    dtype: str
    operations: tuple[Operation, ...] = ()
    opaque: bool = False

    @property
    def stored_path(self) -> Names:
        """Its name on disk, the item first."""
        return (self.item, *to_names(self.record.path))


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlacedLeaf:
    """One leaf of the state.

    Attributes:
        path: Its name, the item first.
        source: The leaf on disk; None if the state keeps its own value.
        target: What is placed, with the path in its item; None if nothing is.
        template: The value of the state.
    """

    path: Names
    source: SourceLeaf | None
    target: Record | None
    template: Any = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class RestorePlan:
    """What a restore will do.

    Attributes:
        placed_leaves: Every leaf of the state, and every leaf of the stateful objects that are restored.
        dropped_leaves: Leaves on disk that are not read because somebody said so.
        differences: What does not fit; empty if the restore can go on.
        skeletons: Containers of stateful objects, by item of the state and path.
        stored: The names that all leaves on disk have after the operations.
    """

    placed_leaves: tuple[PlacedLeaf, ...]
    dropped_leaves: tuple[SourceLeaf, ...]
    differences: tuple[Difference, ...]
    skeletons: Mapping[str, Mapping[Path, Any]]
    stored_names: tuple[Names, ...] = ()

    def collect_records(self) -> dict[str, tuple[Record, ...]]:
        """The leaves to read, by the item they are stored under."""
        wanted: dict[str, list[Record]] = {}
        for leaf in self.placed_leaves:
            if leaf.source is not None:
                wanted.setdefault(leaf.source.item, []).append(leaf.source.record)
        return {item: tuple(records) for item, records in wanted.items()}

    def drop_templates(self) -> "RestorePlan":
        """The plan as a record of what was done: holding on to the old values would double the memory of a restore."""
        return dataclasses.replace(
            self, placed_leaves=tuple(dataclasses.replace(leaf, template=None) for leaf in self.placed_leaves)
        )

    def make_host_items(
        self, templates: Iterable[str], arrays: Mapping[str, dict[Path, np.ndarray[Any, Any]]]
    ) -> dict[str, HostItem]:
        """The arrays that were read, changed and sorted to where they go; they leave `arrays`."""
        items = {
            item: HostItem(records={}, restored_records=[], skeletons=self.skeletons.get(item, {}), arrays={})
            for item in templates
        }
        for leaf in self.placed_leaves:
            if leaf.source is None or leaf.target is None:
                continue
            record, target, item = leaf.source.record, leaf.target, items[leaf.path[0]]
            array = arrays[leaf.source.item].pop(record.path) if record.is_in_orbax else read_inline_array(record)
            if leaf.source.operations and record.kind in ("array", "empty"):
                name = ".".join(leaf.path)
                array = array_operations.apply(name, leaf.source.operations, record, array, target, leaf.template)
            if array is not None and target.is_in_orbax:
                item.arrays[target.path] = array
            item.records[to_names(target.path)] = target
            item.restored_records.append(target)
        return items


def make_restore_plan(
    stored: Mapping[str, StoredItem], templates: Mapping[str, FlatItem], changes: Changes
) -> RestorePlan:
    """Find the stored leaf for every leaf of a state.

    Args:
        stored: All items of a step.
        templates: The items of the state, flattened as templates.
        changes: What may be changed.

    Raises:
        StructureError: If an operation finds nothing, or cannot be done.
    """
    table = _SourceTable(stored)
    for surgery in changes.migrations:
        table.apply(surgery, strict=False)
    table.apply(changes.surgery, strict=True)
    return _LeafMatcher(table, templates, changes.only).plan()


class _SourceTable:
    """The leaves on disk under the names and dtypes that surgery gives them."""

    def __init__(self, stored: Mapping[str, StoredItem]) -> None:
        self.items = tuple(stored)
        self.roots: dict[Names, Any] = {}
        self.sources: list[SourceLeaf] = []
        self.dropped_leaves: list[SourceLeaf] = []
        self.reinits: list[tuple[Reinit, bool]] = []
        for item, part in stored.items():
            self.roots |= {(item, *to_names(root)): skeleton for root, skeleton in part.skeletons.items()}
            for record in part.records:
                opaque = is_below(record.path, part.skeletons)
                path = (item, *to_names(record.path))
                self.sources.append(SourceLeaf(path=path, item=item, record=record, dtype=record.dtype, opaque=opaque))

    def apply(self, surgery: Surgery, *, strict: bool) -> None:
        """Apply operations in order."""
        for operation in surgery:
            if isinstance(operation, Reinit):
                self.reinits.append((operation, strict))
                continue
            parts = Parts([*(source.path for source in self.sources), *self.roots])
            matched = parts.match(operation.pattern)
            if strict and not matched:
                raise make_unmatched_error(operation, parts, "on disk")
            if isinstance(operation, Rename):
                self._rename(operation, matched)
            elif isinstance(operation, Drop):
                self._drop(matched)
            else:
                self.sources = [_add_operation(source, operation, matched) for source in self.sources]

    def _rename(self, operation: Rename, matches: frozenset[Names]) -> None:
        def rename_path(path: Names) -> Names:
            depth = find_outermost_depth(path, matches)
            return (*rename_part(operation, path[:depth]), *path[depth:]) if depth else path

        self.sources = [dataclasses.replace(source, path=rename_path(source.path)) for source in self.sources]
        self.roots = {rename_path(root): skeleton for root, skeleton in self.roots.items()}
        seen: dict[Names, SourceLeaf] = {}
        for source in self.sources:
            other = seen.setdefault(source.path, source)
            if other is not source:
                raise StructureError(
                    what=f"{as_code(operation)} gives two leaves the name {'.'.join(source.path)}: "
                    f"{'.'.join(other.stored_path)} and {'.'.join(source.stored_path)}.",
                    why="one of the two would be lost.",
                    fix=f'ct.Drop("{".".join(other.path)}") before it, or a pattern that tells them apart.',
                )
        # What an earlier migration has left to the state may be called otherwise by now.
        self.reinits = [(_rename_pattern(each, operation), strict) for each, strict in self.reinits]

    def _drop(self, matches: frozenset[Names]) -> None:
        gone = [source for source in self.sources if find_outermost_depth(source.path, matches)]
        self.dropped_leaves += gone
        self.sources = [source for source in self.sources if not find_outermost_depth(source.path, matches)]
        self.roots = {
            root: skeleton for root, skeleton in self.roots.items() if not find_outermost_depth(root, matches)
        }


def _add_operation(source: SourceLeaf, operation: Operation, matches: frozenset[Names]) -> SourceLeaf:
    """A leaf with an operation on its array, if the operation means it."""
    if source.opaque or source.record.kind not in ("array", "empty") or not find_outermost_depth(source.path, matches):
        return source
    if isinstance(operation, Cast):
        if source.dtype != operation.from_dtype:
            return source
        return dataclasses.replace(source, dtype=operation.to_dtype, operations=(*source.operations, operation))
    return dataclasses.replace(source, operations=(*source.operations, operation))


def _rename_pattern(reinit: Reinit, operation: Rename) -> Reinit:
    if find_wildcards(reinit.pattern) or "." not in reinit.pattern:
        return reinit
    path = tuple(split_segments(reinit.pattern))
    matched = Parts([path]).match(operation.pattern)
    depth = find_outermost_depth(path, matched)
    return Reinit(".".join((*rename_part(operation, path[:depth]), *path[depth:]))) if depth else reinit


def make_unmatched_error(operation: Operation | str, parts: Parts, where: str) -> StructureError:
    """The error for a pattern that means nothing; names the closest real names."""
    pattern = operation if isinstance(operation, str) else operation.pattern
    near = find_closest(pattern, parts.paths)
    code = f"only={pattern!r}" if isinstance(operation, str) else as_code(operation)
    return StructureError(
        what=f"{code} matches nothing {where}.",
        why="a mistyped name would leave its leaves as they are without a word.",
        fix=f"did you mean {', '.join(map(repr, near))}?" if near else "see ct.show(directory) for the names.",
    )


class _LeafMatcher:
    """Leaves of the state and leaves on disk, brought together."""

    def __init__(self, table: _SourceTable, templates: Mapping[str, FlatItem], only: Sequence[str]) -> None:
        self._table, self._templates = table, templates
        self._state_names = [to_names((item, *leaf.path)) for item, flat in templates.items() for leaf in flat.leaves]
        self._roots = [to_names((item, *root)) for item, flat in templates.items() for root in flat.skeletons]
        self._reinit_parts: frozenset[Names] = frozenset()
        self._only_parts: frozenset[Names] | None = None
        if table.reinits or only:
            both = Parts([*self._state_names, *self._roots, *(source.path for source in table.sources)])
            for operation, strict in table.reinits:
                matched = both.match(operation.pattern)
                if strict and not matched:
                    raise make_unmatched_error(operation, both, "in the state")
                self._reinit_parts |= matched
            for pattern in only:
                here = Parts([*self._state_names, *self._roots])
                if not here.match(pattern):
                    raise make_unmatched_error(pattern, here, "in the state")
                self._only_parts = (self._only_parts or frozenset()) | both.match(pattern)
        self._differences: list[Difference] = []

    def _get_skip_reason(self, path: Names) -> Literal["", "reinit", "only"]:
        """Why a leaf of the state keeps its value, and a leaf on disk of that name is not read; "" if neither."""
        if self._reinit_parts and find_outermost_depth(path, self._reinit_parts):
            return "reinit"
        return "only" if self._only_parts is not None and not find_outermost_depth(path, self._only_parts) else ""

    def plan(self) -> RestorePlan:
        """Pair all leaves."""
        roots = frozenset(self._roots)
        free: dict[Names, SourceLeaf] = {}
        owned: list[PlacedLeaf] = []
        dropped = list(self._table.dropped_leaves)
        for source in self._table.sources:
            if source.path[0] not in self._templates:
                continue
            if self._get_skip_reason(source.path):
                dropped.append(source)
            elif find_outermost_depth(source.path, roots):
                target = dataclasses.replace(source.record, path=source.path[1:])
                owned.append(PlacedLeaf(path=source.path, source=source, target=target))
            else:
                free[source.path] = source
        placed = [each for item in self._templates for each in self._match_item(item, free)]
        unexpected = [
            Difference(kind="unexpected", path=path, stored=source.record, text="on disk, not in the state passed in")
            for path, source in free.items()
        ]
        return RestorePlan(
            placed_leaves=(*placed, *owned),
            dropped_leaves=tuple(dropped),
            differences=tuple(add_closest_names([*self._differences, *unexpected])),
            skeletons=self._collect_skeletons(),
            stored_names=tuple(source.path for source in self._table.sources),
        )

    def _collect_skeletons(self) -> dict[str, dict[Path, Any]]:
        found: dict[str, dict[Path, Any]] = {item: {} for item in self._templates}
        for root in self._roots:
            if root in self._table.roots and not self._get_skip_reason(root):
                found[root[0]][root[1:]] = self._table.roots[root]
        return found

    def _match_item(self, item: str, unmatched: dict[Names, SourceLeaf]) -> Iterator[PlacedLeaf]:
        flat = self._templates[item]
        known = item in self._table.items or any(source.path[0] == item for source in self._table.sources)
        whole = not known and self._only_parts is None and not self._reinit_parts
        if whole:
            there = ", ".join(self._table.items) or "no items"
            text = f"not on disk; the step has {there}"
            self._differences.append(Difference(kind="missing", path=(item,), text=text))
            return
        for root in flat.skeletons:
            path = to_names((item, *root))
            if path not in self._table.roots and not self._get_skip_reason(path):
                text = "holds a state (get_state/set_state) here and none on disk"
                self._differences.append(Difference(kind="other", path=path, text=text))
        for leaf in flat.leaves:
            path = to_names((item, *leaf.path))
            if why := self._get_skip_reason(path):
                if why == "reinit" and isinstance(leaf.value, jax.ShapeDtypeStruct):
                    array_operations.require_values(".".join(path), leaf.value, "ct.Reinit")
                yield PlacedLeaf(path=path, source=None, target=None, template=leaf.value)
            else:
                yield self._match_leaf(item, leaf, unmatched)

    def _match_leaf(self, item: str, leaf: Leaf, unmatched: dict[Names, SourceLeaf]) -> PlacedLeaf:
        path = to_names((item, *leaf.path))
        # A state of nnx that plain Orbax wrote has the attribute `value` of each variable as a key of its own.
        source = unmatched.pop(path, None) or unmatched.pop((*path, "value"), None)
        if source is None:
            self._differences.append(
                Difference(kind="missing", path=path, text="not on disk", expected=_make_record(leaf))
            )
            return PlacedLeaf(path=path, source=None, target=None, template=leaf.value)
        target = _make_target_record(source, leaf)
        difference = compare(item, leaf, target)
        if difference is not None:
            self._differences.append(difference)
        return PlacedLeaf(path=path, source=source, target=target, template=leaf.value)


def _make_record(leaf: Leaf) -> Record:
    """A leaf of the state as a record, for telling what it is."""
    return describe("", leaf) if is_array(leaf.value) else Record(path=leaf.path, kind="value")


def _make_target_record(source: SourceLeaf, leaf: Leaf) -> Record:
    """The record of a stored leaf after its operations, under the path of the state."""
    record = dataclasses.replace(source.record, path=leaf.path)
    if not source.operations or not is_array(leaf.value):
        return record
    shape = array_operations.compute_shape(
        ".".join(source.path), source.operations, record.shape, tuple(leaf.value.shape)
    )
    return dataclasses.replace(
        record, shape=shape, dtype=source.dtype, kind="empty" if 0 in shape else "array", digest="", value=None
    )
