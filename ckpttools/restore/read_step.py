# SPDX-License-Identifier: Apache-2.0
"""Read one step into host memory: plan it, verify every byte that the state needs, and apply surgery.

All leaves are read and their digests compared before the first live leaf is replaced (`tree.write_back`).
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import jax

from ..errors import IncompleteStepError, StructureError
from ..processes import messages
from ..spec.operations import Operation
from ..store import leaf_integrity
from ..store.catalogue import Entry
from ..store.manifest import Manifest
from ..surgery.make_plan import make_restore_plan
from ..surgery.plan import Changes, RestorePlan
from ..surgery.suggest import Replan, require_match
from ..tree import flatten
from ..tree.leaf_paths import to_names
from ..tree.placing import TargetLeaf, require_placeable
from ..tree.records import Record
from ..tree.write_back import HostItem, require_legal_skeletons


@dataclasses.dataclass(frozen=True)
class LoadedStep:
    """A step on the host whose bytes were verified.

    Attributes:
        entry: The step.
        manifest: Its manifest.
        items: Its leaves after surgery, by item of the state.
        plan: What was done to each leaf, without the values of the state.
    """

    entry: Entry
    manifest: Manifest
    items: dict[str, HostItem]
    plan: RestorePlan


type GetChanges = Callable[[Entry], Changes]
"""Returns what may be changed in the leaves of a step; raises `VersionError` if its version is not supported."""


def get_no_changes(entry: Entry) -> Changes:
    """Return no changes, for steps that must fit as they are."""
    return Changes()


def read_step(entry: Entry, templates: Mapping[str, flatten.FlatItem], get_changes: GetChanges) -> LoadedStep:
    """Read and verify the leaves of one step that the templates need, and apply the operations.

    Raises:
        StepDamagedError: If a leaf is missing or damaged.
        StructureError: If the step does not fit.
        PlacementError: If a leaf cannot be placed where the state has it.
        VersionError: If the version of its state is not supported.
    """
    if entry.manifest is None:
        raise entry.error or IncompleteStepError(what=f"step {entry.step} has no manifest.")
    plan = plan_restore(entry, templates, get_changes(entry))
    targets: dict[str, list[Record]] = {item: [] for item in templates}
    for leaf in plan.placed_leaves:
        if leaf.target is not None:
            targets[leaf.path[0]].append(leaf.target)
    for item, template in templates.items():
        require_legal_skeletons(template, targets[item], plan.skeletons.get(item, {}))
    # Before arrays are read, which may take minutes.
    require_placeable(list_placed(plan))
    _require_same_processes(entry, plan)
    arrays = leaf_integrity.read_verified(entry, plan.collect_records())
    # Surgery may read values of the live state.
    with jax.transfer_guard("allow"):
        items = plan.make_host_items(templates, arrays)
    return LoadedStep(entry, entry.manifest, items, plan.drop_templates())


def list_placed(plan: RestorePlan) -> list[TargetLeaf]:
    """Return the leaves that are placed on devices; those of stateful objects stay on the host."""
    return [
        (".".join(leaf.path), leaf.template, leaf.target)
        for leaf in plan.placed_leaves
        if leaf.target is not None and leaf.template is not None
    ]


def _require_same_processes(entry: Entry, plan: RestorePlan) -> None:
    """Raise `StructureError` if the state needs a per-process leaf and the number of processes has changed."""
    contents, count = entry.manifest and entry.manifest.contents, messages.get_process_index_and_count()[1]
    local = {(item, *to_names(path)) for item, path in contents.find_local_paths(count)} if contents else set()
    for leaf in plan.placed_leaves:
        paths = [each.stored_path for each in leaf.source.iterate_stored()] if leaf.source and local else []
        stored = next((each for each in paths if any(each[:depth] in local for depth in range(len(each) + 1))), None)
        if contents and stored is not None:
            raise StructureError(
                what=f"{'.'.join(stored)} of step {entry.step} was saved by {contents.processes} processes, each with "
                f"its own value; now there are {count}.",
                why="assigning the values to processes would be a guess. Nothing was changed.",
                fix=f"leave {stored[0]!r} out of the state and set it yourself, or restore with as many processes.",
            )


def plan_restore(entry: Entry, templates: Mapping[str, flatten.FlatItem], changes: Changes) -> RestorePlan:
    """Return what a restore of one step will do.

    Raises:
        StructureError: If the step does not fit; the error suggests surgery.
    """
    plan, replan = pair_leaves(entry, templates, changes)
    require_match(entry.step, plan, replan, tuple(changes.surgery))
    return plan


def pair_leaves(
    entry: Entry, templates: Mapping[str, flatten.FlatItem], changes: Changes
) -> tuple[RestorePlan, Replan]:
    """Return the plan for one step, and a function that plans with more surgery."""
    contents = entry.manifest and entry.manifest.contents
    stored = contents.get_process_items(*messages.get_process_index_and_count()) if contents else {}
    changes = dataclasses.replace(changes, stored_exclude=contents.exclude if contents else ())

    def replan(more: Sequence[Operation]) -> RestorePlan:
        return make_restore_plan(stored, templates, dataclasses.replace(changes, surgery=changes.surgery + more))

    return replan(()), replan
