# SPDX-License-Identifier: Apache-2.0
"""Find the stored leaf for every leaf of a state, and list every difference.

Without surgery, leaves of equal names are paired, and whatever does not fit is a difference.
"""

import collections
import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, Literal

import jax

from ..spec.operations import Operation
from ..spec.state import Exclude, find_exclusion, find_exclusion_of_all
from ..tree.flatten import FlatItem
from ..tree.leaf_paths import Names, Path, to_names
from ..tree.leaves import Leaf, describe, is_array, is_key
from ..tree.match import Difference, add_closest_names, compare, mask_numbers
from ..tree.records import Kind, Record, get_host_shape
from .array_operations import require_values
from .plan import Changes, PlacedLeaf, RestorePlan, SourceLeaf
from .recomputed import find_recomputed
from .renaming import Parts, find_outermost_depth
from .resize import compute_shape
from .stored_leaves import StoredItem, StoredLeaves, make_unmatched_error


def make_restore_plan(
    stored: Mapping[str, StoredItem], templates: Mapping[str, FlatItem], changes: Changes
) -> RestorePlan:
    """Return the plan that pairs every leaf of a state with a stored leaf.

    Args:
        stored: All items of a step.
        templates: The items of the state, flattened as templates.
        changes: Migrations, surgery and the selection of leaves.

    Raises:
        StructureError: If an operation matches nothing, or cannot be applied.
    """
    table = StoredLeaves(stored)
    for surgery in changes.migrations:
        table.apply(surgery, strict=False)
    table.apply(changes.surgery, strict=True)
    return _LeafMatcher(table, templates, changes).plan()


_MAX_COMPARISONS = 10_000
"""Pairs of kinds of names; comparing one takes about 50 us."""


class _LeafMatcher:
    """Pairs the leaves of a state with the leaves on disk."""

    def __init__(self, table: StoredLeaves, templates: Mapping[str, FlatItem], changes: Changes) -> None:
        shared = {
            source.path
            for source in table.sources
            if not source.opaque and find_exclusion(changes.stored_exclude, source.stored_path)
        }
        self._table, self._templates, only = table, _leave_out(templates, changes.exclude, shared), changes.only
        self._rules = changes.exclude
        self._excluded = frozenset(
            to_names((item, *path)) for item, flat in self._templates.items() for path, _ in flat.excluded
        )
        templates = self._templates
        self._state_names = [to_names((item, *leaf.path)) for item, flat in templates.items() for leaf in flat.leaves]
        self._leaf_names = frozenset(self._state_names)
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
        """Return why a leaf keeps the value in the state and is not read from disk; "" if it is read."""
        if self._reinit_parts and find_outermost_depth(path, self._reinit_parts):
            return "reinit"
        return "only" if self._only_parts is not None and not find_outermost_depth(path, self._only_parts) else ""

    def plan(self) -> RestorePlan:
        """Pair all leaves and collect the differences."""
        roots = frozenset(self._roots)
        free: dict[Names, SourceLeaf] = {}
        owned: list[PlacedLeaf] = []
        dropped, excluded = list(self._table.dropped_leaves), []
        for source in self._table.sources:
            if source.path[0] not in self._templates:
                continue
            if self._is_excluded(source):
                excluded.append(source)
            elif self._get_skip_reason(source.path):
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
        differences = _add_hints([*self._differences, *unexpected])
        return RestorePlan(
            placed_leaves=(*placed, *owned),
            dropped_leaves=tuple(dropped),
            differences=differences,
            skeletons=self._collect_skeletons(),
            excluded_leaves=tuple(excluded),
            sources=tuple(self._table.sources),
            state_records=self._describe_state() if differences else {},
            recomputed_paths=self._find_recomputed() if differences else frozenset(),
        )

    def _is_excluded(self, source: SourceLeaf) -> bool:
        """Return whether a leaf on disk is excluded: by its type, its name, or its variable in the state."""
        types = (source.record.variable,) if source.record.variable else ()
        path = source.path
        if source.opaque:
            # A rule leaves out the state of an object as a whole or not at all, as at the save.
            path = path[: find_outermost_depth(path, frozenset(self._table.roots))] or path
        reason = find_exclusion(self._rules, path, types)
        if reason and (reason in types or not self._is_state(source.path)):
            return True
        return bool(self._excluded) and find_outermost_depth(source.path, self._excluded) > 0

    def _is_state(self, path: Names) -> bool:
        """Return whether the state has a leaf of that name, which may also have a name that no rule leaves out."""
        return path in self._leaf_names or (path[-1] == "value" and path[:-1] in self._leaf_names)

    def _find_recomputed(self) -> frozenset[Names]:
        types = {name for rule in self._rules for name in rule.types}
        return find_recomputed([source.path for source in self._table.sources], self._leaf_names, self._excluded, types)

    def _describe_state(self) -> dict[Names, Record]:
        leaves = ((item, leaf) for item, flat in self._templates.items() for leaf in flat.leaves)
        return {to_names((item, *leaf.path)): _make_record(leaf) for item, leaf in leaves}

    def _collect_skeletons(self) -> dict[str, dict[Path, Any]]:
        found: dict[str, dict[Path, Any]] = {item: {} for item in self._templates}
        for root in self._roots:
            if root in self._table.roots and not self._get_skip_reason(root):
                found[root[0]][root[1:]] = self._table.roots[root]
        return found

    def _match_item(self, item: str, unmatched: dict[Names, SourceLeaf]) -> Iterator[PlacedLeaf]:
        flat = self._templates[item]
        is_stored = item in self._table.items or any(source.path[0] == item for source in self._table.sources)
        if not is_stored and not flat.leaves and not flat.skeletons and flat.excluded:
            return
        if not is_stored and self._only_parts is None and not self._reinit_parts:
            stored_items = ", ".join(self._table.items) or "no items"
            text = f"not on disk; the step has {stored_items}"
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
                    require_values(".".join(path), leaf.value, "ct.Reinit")
                yield PlacedLeaf(path=path, source=None, target=None, template=leaf.value)
            else:
                yield self._match_leaf(item, leaf, unmatched)

    def _match_leaf(self, item: str, leaf: Leaf, unmatched: dict[Names, SourceLeaf]) -> PlacedLeaf:
        path = to_names((item, *leaf.path))
        # In an nnx state that plain Orbax wrote, the `value` of each variable has a separate key.
        source = unmatched.pop(path, None) or unmatched.pop((*path, "value"), None)
        if source is None:
            self._differences.append(
                Difference(kind="missing", path=path, text="not on disk", expected=_make_record(leaf))
            )
            return PlacedLeaf(path=path, source=None, target=None, template=leaf.value)
        target = _convert_keys(_make_target_record(source, leaf), leaf)
        difference = compare(item, leaf, target)
        if difference is not None:
            self._differences.append(difference)
        return PlacedLeaf(path=path, source=source, target=target, template=leaf.value)


def _leave_out(
    templates: Mapping[str, FlatItem], rules: Sequence[Exclude], shared: Collection[Names]
) -> dict[str, FlatItem]:
    """Return the items of the state without the excluded leaves, which keep their values.

    Args:
        templates: The items.
        rules: What is excluded.
        shared: Names of leaves on disk that no pattern excludes, because their variable had another name, too.
    """
    found = {}
    for item, flat in templates.items():
        reasons = {
            leaf.path: find_exclusion_of_all(rules, [(item, *path) for path in (leaf.path, *leaf.aliases)], leaf.types)
            for leaf in flat.leaves
        }
        for path, reason in reasons.items() if shared else ():
            is_pattern = bool(reason) and any(reason in rule.paths for rule in rules)
            reasons[path] = "" if is_pattern and to_names((item, *path)) in shared else reason
        roots = {root: find_exclusion(rules, (item, *root)) for root in flat.skeletons}
        found[item] = FlatItem(
            [leaf for leaf in flat.leaves if not reasons[leaf.path]],
            {root: skeleton for root, skeleton in flat.skeletons.items() if not roots[root]},
            [(path, reason) for path, reason in (*reasons.items(), *roots.items()) if reason],
        )
    return found


def _add_hints(differences: list[Difference]) -> tuple[Difference, ...]:
    """Add the closest names on disk to missing leaves, unless comparing all kinds of names would take seconds."""
    kinds = collections.Counter(kind for kind, _ in {(each.kind, mask_numbers(each.path)) for each in differences})
    is_quick = kinds["missing"] * kinds["unexpected"] <= _MAX_COMPARISONS
    return tuple(add_closest_names(differences) if is_quick else differences)


def _make_record(leaf: Leaf) -> Record:
    """Return a leaf of the state as a record, for messages."""
    return describe("", leaf) if is_array(leaf.value) else Record(path=leaf.path, kind="value")


def _convert_keys(target: Record, leaf: Leaf) -> Record:
    """Return the record of key data on disk as typed keys, if the state has typed ones there; or the reverse.

    Flax's msgpack files and `jax.random.PRNGKey` hold the data of a key as an ordinary array: its bits are the same.
    """
    if not is_array(leaf.value) or is_key(leaf.value) == (target.kind == "key"):
        return target
    here = _make_record(leaf)
    forms = [(*get_host_shape(record),) for record in (target, here) if record.kind != "value"]
    if len(forms) < 2 or forms[0] != forms[1] or 0 in here.shape:
        return target
    return dataclasses.replace(
        target, kind=here.kind, shape=here.shape, dtype=here.dtype, digest="", slices=(), scalar="", weak_type=False
    )


def _make_target_record(source: SourceLeaf, leaf: Leaf) -> Record:
    """Return the record of a stored leaf after its operations, under its path in the state."""
    record = dataclasses.replace(source.record, path=leaf.path)
    if not source.is_changed:
        return record
    operations = [each for each in source.operations if isinstance(each, Operation)]
    here = tuple(leaf.value.shape) if is_array(leaf.value) else source.shape
    shape = compute_shape(".".join(source.path), operations, source.shape, here)
    kind: Kind = "key" if record.kind == "key" else "empty" if 0 in shape else "array"
    return dataclasses.replace(
        record,
        shape=shape,
        dtype=source.dtype,
        kind=kind,
        digest="",
        value=None,
        slices=(),
        scalar=record.scalar if shape == () else "",
        # A cast names its dtype, so the result is strongly typed.
        weak_type=record.weak_type and source.dtype == record.dtype,
    )
