# SPDX-License-Identifier: Apache-2.0
"""What a restore will do: which stored leaf goes to which leaf of the state, and which operations change it.

Only names, shapes and dtypes stand here, which is all that a dry run needs. `make_plan` makes a plan; after the leaves
that it names were read and verified, the plan applies their operations on the host.
"""

import dataclasses
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from ..spec.operations import Cast, Join, Operation
from ..spec.state import DEFAULT_RULES, Exclude
from ..spec.surgery import Surgery
from ..tree.leaf_paths import Names, Path, to_names
from ..tree.match import Difference
from ..tree.records import Record, get_host_shape, read_inline_array
from ..tree.write_back import HostItem
from . import array_operations
from .array_operations import Array, ArrayStep
from .resize import Shape


@dataclasses.dataclass(frozen=True, kw_only=True)
class Changes:
    """What may be changed in stored leaves so that they fit.

    Attributes:
        migrations: Surgery from older versions of the state, in order; operations that match nothing are skipped.
        surgery: Surgery that the caller requested; each operation must match something.
        only: Patterns of the leaves to restore; all others keep their values. Empty for all leaves.
        exclude: Which variables are not state: those of the state keep their values, those on disk are ignored.
        stored_exclude: The rules that the step was saved with. A leaf that it has although one of their patterns names
            it is a variable that also had a name outside; a functional state does not know that name.
    """

    migrations: tuple[Surgery, ...] = ()
    surgery: Surgery = dataclasses.field(default_factory=Surgery)
    only: tuple[str, ...] = ()
    exclude: tuple[Exclude, ...] = DEFAULT_RULES
    stored_exclude: tuple[Exclude, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceLeaf:
    """One leaf on disk, a piece of one, or several joined to one array.

    Attributes:
        path: Its name after surgery, the item first.
        item: Name of the item that stores it; for a joined leaf, the item of the first part.
        record: The record of the stored leaf, or of the joined array.
        dtype: Name of its dtype after the casts.
        shape: Its shape after the steps; for a key, the shape of the typed array.
        operations: Steps and operations on its array, in order.
        actions: Changes by surgery other than names, dtypes and sizes, such as "stacked" or "transposed".
        parts: The joined leaves, in order; empty for one leaf.
        join: The operation that joins them and its axis, which is not negative.
        opaque: Whether it belongs to an object with `get_state`, whose leaves no operation may change.
    """

    path: Names
    item: str
    record: Record
    dtype: str
    shape: Shape
    operations: tuple[Operation | ArrayStep, ...] = ()
    actions: tuple[str, ...] = ()
    parts: tuple["SourceLeaf", ...] = ()
    join: tuple[Join, int] | None = None
    opaque: bool = False

    @property
    def stored_path(self) -> Names:
        """Its name on disk, the item first; for a joined leaf, the name of the first part."""
        return (self.item, *to_names(self.record.path))

    @property
    def is_changed(self) -> bool:
        """Whether its array differs from the stored one."""
        return bool(self.operations or self.parts)

    def iterate_stored(self) -> Iterator["SourceLeaf"]:
        """Yield the stored leaves that it is made of."""
        if not self.parts:
            yield self
        for part in self.parts:
            yield from part.iterate_stored()

    def assemble(self, arrays: "_ReadArrays") -> Array | None:
        """Return its array after joins, steps and casts; None for a leaf without an array in Orbax."""
        if self.join is not None:
            assembled = [part.assemble(arrays) for part in self.parts]
            array: Array | None = array_operations.join_arrays(
                *self.join, [each for each in assembled if each is not None]
            )
        else:
            array = arrays.take(self)
        if array is None:
            if self.record.kind == "value":
                return None
            array = np.zeros(*get_host_shape(self.record))
        for operation in self.operations:
            if isinstance(operation, Cast):
                array = array_operations.cast(".".join(self.path), operation, array)
            elif isinstance(operation, ArrayStep):
                array = array_operations.apply_step(operation, array)
        return array


class _ReadArrays:
    """The arrays that were read, each handed out as often as it is used and then freed."""

    def __init__(self, arrays: Mapping[str, dict[Path, Array]], leaves: Iterable["PlacedLeaf"]) -> None:
        self._arrays = arrays
        stored = (each for leaf in leaves if leaf.source is not None for each in leaf.source.iterate_stored())
        self._uses = Counter((each.item, each.record.path) for each in stored if each.record.is_in_orbax)

    def take(self, source: SourceLeaf) -> Array | None:
        """Return the array of a stored leaf."""
        if not source.record.is_in_orbax:
            return read_inline_array(source.record)
        key = (source.item, source.record.path)
        self._uses[key] -= 1
        # On CPU a device array may be the host's memory, so no two leaves may share it.
        if self._uses[key]:
            return self._arrays[source.item][source.record.path].copy()
        return self._arrays[source.item].pop(source.record.path)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlacedLeaf:
    """One leaf of the state.

    Attributes:
        path: Its name, the item first.
        source: The leaf on disk; None if the state keeps its own value.
        target: Record of the array that is placed, with its path in the item; None if the state keeps its own value.
        template: The value in the state.
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
        dropped_leaves: Leaves on disk that are not read because of `Drop`, `Reinit` or `only`.
        excluded_leaves: Leaves on disk that are not read because they are not state.
        differences: What does not fit; empty if the restore can proceed.
        skeletons: Containers of stateful objects, by item of the state and path.
        sources: All leaves on disk that are not dropped, under the names that they have after the operations.
        state_records: Every leaf of the state as a record; empty if nothing differs.
        recomputed_paths: Those of `sources` that are not state although nothing on disk says so; empty if nothing
            differs.
    """

    placed_leaves: tuple[PlacedLeaf, ...]
    dropped_leaves: tuple[SourceLeaf, ...]
    differences: tuple[Difference, ...]
    skeletons: Mapping[str, Mapping[Path, Any]]
    excluded_leaves: tuple[SourceLeaf, ...] = ()
    sources: tuple[SourceLeaf, ...] = ()
    state_records: Mapping[Names, Record] = dataclasses.field(default_factory=dict)
    recomputed_paths: frozenset[Names] = frozenset()

    def collect_records(self) -> dict[str, tuple[Record, ...]]:
        """Return the leaves to read, by the item they are stored under."""
        collected: dict[str, dict[Path, Record]] = {}
        for leaf in self.placed_leaves:
            for stored in leaf.source.iterate_stored() if leaf.source is not None else ():
                collected.setdefault(stored.item, {})[stored.record.path] = stored.record
        return {item: tuple(records.values()) for item, records in collected.items()}

    def drop_templates(self) -> "RestorePlan":
        """Return the plan without the values of the state, which would double the memory of a restore."""
        return dataclasses.replace(
            self, placed_leaves=tuple(dataclasses.replace(leaf, template=None) for leaf in self.placed_leaves)
        )

    def make_host_items(self, templates: Iterable[str], arrays: Mapping[str, dict[Path, Array]]) -> dict[str, HostItem]:
        """Apply the operations to the arrays that were read, and sort them by where they go; empties `arrays`."""
        items = {
            item: HostItem(records={}, restored_records=[], skeletons=self.skeletons.get(item, {}), arrays={})
            for item in templates
        }
        read = _ReadArrays(arrays, self.placed_leaves)
        for leaf in self.placed_leaves:
            if leaf.source is None or leaf.target is None:
                continue
            source, target, item = leaf.source, leaf.target, items[leaf.path[0]]
            array = source.assemble(read)
            if source.is_changed and source.record.kind != "value":
                resizing = [each for each in source.operations if isinstance(each, Operation)]
                array = array_operations.apply(
                    ".".join(leaf.path), resizing, source.record, array, target, leaf.template
                )
            if array is not None and target.is_in_orbax:
                item.arrays[target.path] = array
            item.records[to_names(target.path)] = target
            item.restored_records.append(target)
        return items
