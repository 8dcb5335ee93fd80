# SPDX-License-Identifier: Apache-2.0
"""What a restore will do: which stored leaf goes to which leaf of the state, and which operations change it.

Only names, shapes and dtypes stand here, which is all that a dry run needs. `make_plan` makes a plan; after the leaves
that it names were read and verified, the plan applies their operations on the host.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from ..spec.exclude import DEFAULT_RULES, Exclude
from ..spec.operations import Operation
from ..spec.surgery import Surgery
from ..tree.leaf_paths import Names, Path, to_names
from ..tree.match import Difference
from ..tree.records import Record, read_inline_array
from ..tree.write_back import HostItem
from . import array_operations


@dataclasses.dataclass(frozen=True, kw_only=True)
class Changes:
    """What may be changed in stored leaves so that they fit.

    Attributes:
        migrations: Surgery from older versions of the state, in order; operations that match nothing are skipped.
        surgery: Surgery that the caller requested; each operation must match something.
        only: Patterns of the leaves to restore; all others keep their values. Empty for all leaves.
        exclude: Which variables are not state: those of the state keep their values, those on disk are ignored.
    """

    migrations: tuple[Surgery, ...] = ()
    surgery: Surgery = dataclasses.field(default_factory=Surgery)
    only: tuple[str, ...] = ()
    exclude: tuple[Exclude, ...] = DEFAULT_RULES


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceLeaf:
    """One leaf on disk.

    Attributes:
        path: Its name after surgery, the item first.
        item: Name of the item that it is stored under.
        record: The leaf as it is stored.
        dtype: Name of its dtype after the casts.
        operations: Operations on its array, in order.
        opaque: Whether it belongs to an object with `get_state`, whose leaves no operation may change.
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
        stored_names: The names that all leaves on disk have after the operations.
    """

    placed_leaves: tuple[PlacedLeaf, ...]
    dropped_leaves: tuple[SourceLeaf, ...]
    differences: tuple[Difference, ...]
    skeletons: Mapping[str, Mapping[Path, Any]]
    stored_names: tuple[Names, ...] = ()
    excluded_leaves: tuple[SourceLeaf, ...] = ()

    def collect_records(self) -> dict[str, tuple[Record, ...]]:
        """Return the leaves to read, by the item they are stored under."""
        collected: dict[str, list[Record]] = {}
        for leaf in self.placed_leaves:
            if leaf.source is not None:
                collected.setdefault(leaf.source.item, []).append(leaf.source.record)
        return {item: tuple(records) for item, records in collected.items()}

    def drop_templates(self) -> "RestorePlan":
        """Return the plan without the values of the state, which would double the memory of a restore."""
        return dataclasses.replace(
            self, placed_leaves=tuple(dataclasses.replace(leaf, template=None) for leaf in self.placed_leaves)
        )

    def make_host_items(
        self, templates: Iterable[str], arrays: Mapping[str, dict[Path, np.ndarray[Any, Any]]]
    ) -> dict[str, HostItem]:
        """Apply the operations to the arrays that were read, and sort them by where they go; empties `arrays`."""
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
