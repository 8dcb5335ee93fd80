# SPDX-License-Identifier: Apache-2.0
"""The leaves of a step under the names and dtypes that surgery gives them.

Operations are applied in order, and to names alone: arrays are read later, and only those that the plan needs.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol

from remattools.rules.paths import find_closest

from ..errors import StructureError
from ..spec.operations import Cast, Drop, Operation, Pad, Reinit, Rename, Slice, as_code, find_wildcards, split_segments
from ..spec.surgery import Surgery
from ..tree.leaf_paths import Names, Path, is_below, to_names
from ..tree.records import Record
from .joining import Restructuring, restructure
from .plan import SourceLeaf
from .renaming import Parts, find_outermost_depth, rename_leaf


class StoredItem(Protocol):
    """One item of a step, as its manifest describes it."""

    @property
    def records(self) -> tuple[Record, ...]:
        """Its leaves."""

    @property
    def skeletons(self) -> Mapping[Path, Any]:
        """The containers of its stateful objects."""


class StoredLeaves:
    """The leaves of a step and the containers of its stateful objects, renamed by each operation applied.

    Attributes:
        items: Names of the items on disk.
        roots: Containers of stateful objects, by their present name.
        sources: The leaves that are not dropped.
        dropped_leaves: The leaves that a `Drop` matched.
        reinits: Every `Reinit`, and whether it must match something.
    """

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
                self.sources.append(
                    SourceLeaf(
                        path=path, item=item, record=record, dtype=record.dtype, shape=record.shape, opaque=opaque
                    )
                )

    def apply(self, surgery: Surgery, *, strict: bool) -> None:
        """Apply operations in order.

        Raises:
            StructureError: If an operation matches nothing and `strict` is true, or two leaves get one name.
        """
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
            elif isinstance(operation, Cast | Pad | Slice):
                self.sources = [_add_operation(source, operation, matched) for source in self.sources]
            elif isinstance(operation, Restructuring):
                self.sources = list(restructure(self.sources, operation, matched))
                self._require_unique_names(operation)

    def _rename(self, operation: Rename, matches: frozenset[Names]) -> None:
        self.sources = [
            dataclasses.replace(source, path=rename_leaf(operation, source.path, matches)) for source in self.sources
        ]
        self.roots = {rename_leaf(operation, root, matches): skeleton for root, skeleton in self.roots.items()}
        self._require_unique_names(operation)
        # A later migration may rename what an earlier one reinitialises.
        self.reinits = [(_rename_reinit(each, operation), strict) for each, strict in self.reinits]

    def _require_unique_names(self, operation: Operation) -> None:
        seen: dict[Names, SourceLeaf] = {}
        for source in self.sources:
            other = seen.setdefault(source.path, source)
            if other is not source:
                raise StructureError(
                    what=f"{as_code(operation)} gives two leaves the name {'.'.join(source.path)}: "
                    f"{'.'.join(other.stored_path)} and {'.'.join(source.stored_path)}.",
                    why="one of them would be lost.",
                    fix=f'ct.Drop("{".".join(other.path)}") before it, or a pattern that distinguishes them.',
                )

    def _drop(self, matches: frozenset[Names]) -> None:
        self.dropped_leaves += [source for source in self.sources if find_outermost_depth(source.path, matches)]
        self.sources = [source for source in self.sources if not find_outermost_depth(source.path, matches)]
        self.roots = {
            root: skeleton for root, skeleton in self.roots.items() if not find_outermost_depth(root, matches)
        }


def _add_operation(source: SourceLeaf, operation: Operation, matches: frozenset[Names]) -> SourceLeaf:
    """Return the leaf with an operation appended, if the operation applies to it."""
    kinds = ("array", "empty") if isinstance(operation, Cast) else ("array", "empty", "key")
    if source.opaque or source.record.kind not in kinds or not find_outermost_depth(source.path, matches):
        return source
    if isinstance(operation, Cast):
        if source.dtype != operation.from_dtype:
            return source
        return dataclasses.replace(source, dtype=operation.to_dtype, operations=(*source.operations, operation))
    return dataclasses.replace(source, operations=(*source.operations, operation))


def _rename_reinit(reinit: Reinit, operation: Rename) -> Reinit:
    if find_wildcards(reinit.pattern) or "." not in reinit.pattern:
        return reinit
    path = tuple(split_segments(reinit.pattern))
    matches = Parts([path]).match(operation.pattern)
    return Reinit(".".join(rename_leaf(operation, path, matches)))


def make_unmatched_error(operation: Operation | str, parts: Parts, where: str) -> StructureError:
    """Return the error for a pattern that matches nothing; it lists the closest real names."""
    pattern = operation if isinstance(operation, str) else operation.pattern
    near = find_closest(pattern, parts.paths)
    code = f"only={pattern!r}" if isinstance(operation, str) else as_code(operation)
    return StructureError(
        what=f"{code} matches nothing {where}.",
        why="a mistyped name would silently leave its leaves unchanged.",
        fix=f"did you mean {', '.join(map(repr, near))}?" if near else "see ct.show(directory) for the names.",
    )
