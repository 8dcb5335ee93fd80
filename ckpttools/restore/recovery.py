# SPDX-License-Identifier: Apache-2.0
"""Find a step that can be restored, prove it, and only then touch the live state.

Candidates are tried from the newest to the oldest. Damage (incomplete, corrupt) and what the run's validation rejects
is passed over and reported; a structure that does not fit and a disk that does not answer are raised, because the next
candidate would not help. A directory that holds steps and none intact raises: it never looks like a fresh start.

All leaves are read to the host and their digests compared before the first live leaf is replaced (`state.place`).
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any, Literal

from ..errors import (
    IncompleteStepError,
    MirrorError,
    NoIntactStepError,
    StepDamagedError,
    StepRejectedError,
    StructureError,
)
from ..processes import group
from ..spec.operations import Operation
from ..store import leaf_integrity
from ..store.catalogue import Entry
from ..store.manifest import Manifest
from ..store.run_directory import RunDirectory
from ..surgery import plan
from ..surgery.suggest import Replan, require_match
from ..tree import flatten
from ..tree.leaf_paths import Names, to_names
from ..tree.write_back import HostItem, require_legal_skeletons
from .report import Candidate, RestoreReport


@dataclasses.dataclass(frozen=True)
class LoadedStep:
    """A step whose bytes were proved intact, on the host."""

    entry: Entry
    manifest: Manifest
    items: dict[str, HostItem]
    plan: plan.RestorePlan


type GetChanges = Callable[[Entry], plan.Changes]
"""What may be done to the leaves of a step; raises `VersionError` if the step's version is not known."""


def get_no_changes(entry: Entry) -> plan.Changes:
    """For steps that have to fit as they are."""
    return plan.Changes()


type Check = Callable[[LoadedStep], None]
"""A further check on a loaded step; raises `StepDamagedError` to reject it."""


type Attempt = Callable[[], tuple[LoadedStep, list[Candidate]]]
type Coordinator = Callable[[Entry, Attempt], tuple[LoadedStep, list[Candidate]]]


def run_attempt(entry: Entry, attempt: Attempt) -> tuple[LoadedStep, list[Candidate]]:
    """For a process that asks no other."""
    return attempt()


def load_first_intact(
    candidates: Sequence[Entry],
    state: Mapping[str, Any],
    *,
    check: Check,
    run: RunDirectory | None,
    is_explicit: bool = False,
    get_changes: GetChanges = get_no_changes,
    coordinate: Coordinator = run_attempt,
) -> tuple[LoadedStep | None, list[Candidate]]:
    """The first candidate whose bytes are proved, and the record of all that were tried.

    Args:
        candidates: Steps in the order in which they are tried.
        state: The template.
        check: A further check.
        run: The run; its damaged steps are moved out of the way unless another process writes to it. None to move
            nothing.
        is_explicit: Whether the candidates are copies of one step that was asked for.
        get_changes: What may be done to the leaves of a step so that they fit.
        coordinate: Makes one outcome of those of all processes.

    Raises:
        StepDamagedError: If a step was asked for and no copy of it is intact.
        StructureError: If an intact step does not fit the template.
        StorageError: If the disk does not answer, or the mirror, and there is nothing intact here.
    """
    tried: list[tuple[Entry, Candidate]] = []
    first: StepDamagedError | None = None
    silent: MirrorError | None = None
    for entry in candidates:
        try:
            loaded, (used,) = coordinate(
                entry, functools.partial(load_one, entry, state, check=check, get_changes=get_changes)
            )
        except StepDamagedError as error:
            tried.append((entry, _make_rejected_candidate(entry, error)))
            first = first or error
            continue
        except MirrorError as error:
            # A store that falls silent half way is as one that did not answer: there may be steps here.
            tried.append((entry, Candidate(step=entry.step, verdict="unreachable", reason=error.what, source="mirror")))
            silent = silent or error
            continue
        # Only now: with nothing intact all stays where it is, or the next start would find an empty directory.
        return loaded, [*_quarantine_damaged(run, tried), used]
    if silent is not None:
        raise silent
    if is_explicit and first is not None:
        raise first
    return None, [candidate for _, candidate in tried]


def load_one(
    entry: Entry, state: Mapping[str, Any], *, check: Check, get_changes: GetChanges = get_no_changes
) -> tuple[LoadedStep, list[Candidate]]:
    """One step and no other; its damage is raised."""
    if entry.fetch is not None:
        entry.fetch()
    loaded = load(
        entry, {item: flatten.flatten_item(value, template=True) for item, value in state.items()}, get_changes
    )
    check(loaded)
    return loaded, [Candidate(step=entry.step, verdict="used", source=_get_source(entry))]


def load(entry: Entry, templates: Mapping[str, flatten.FlatItem], get_changes: GetChanges) -> LoadedStep:
    """Read the leaves of one step that the templates ask for, prove every byte of them, and change what has to be."""
    if entry.manifest is None:
        raise entry.error or IncompleteStepError(what=f"step {entry.step} has no manifest.")
    plan = plan_restore(entry, templates, get_changes(entry))
    for item, template in templates.items():
        leaves = [leaf.target for leaf in plan.placed_leaves if leaf.path[0] == item and leaf.target is not None]
        require_legal_skeletons(template, leaves, plan.skeletons.get(item, {}))
    _require_same_processes(entry, plan)
    arrays = leaf_integrity.read_verified(entry, plan.collect_records())
    return LoadedStep(entry, entry.manifest, plan.make_host_items(templates, arrays), plan.drop_templates())


def _require_same_processes(entry: Entry, plan: plan.RestorePlan) -> None:
    """Raise `StructureError` if a leaf is asked for that each process had of its own, and their number has changed."""
    contents, count = entry.manifest and entry.manifest.contents, group.get_process_index_and_count()[1]
    own = {(item, *to_names(path)) for item, path in contents.find_local_paths(count)} if contents else set()
    for leaf in plan.placed_leaves:
        stored = leaf.source.stored_path if leaf.source else ()
        if contents and any(stored[: len(path)] == path for path in own):
            raise StructureError(
                what=f"{'.'.join(stored)} of step {entry.step} was saved by {contents.processes} processes, each with "
                f"a value of its own; now there are {count}.",
                why="which of the values belongs where is not for a guess. Nothing was changed.",
                fix=f"leave {stored[0]!r} out of the state and set it yourself, or restore with as many processes.",
            )


def plan_restore(entry: Entry, templates: Mapping[str, flatten.FlatItem], changes: plan.Changes) -> plan.RestorePlan:
    """What a restore of one step will do.

    Raises:
        StructureError: If it does not fit.
    """
    plan, here, retry = pair_leaves(entry, templates, changes)
    require_match(entry.step, plan, here, retry, tuple(changes.surgery))
    return plan


def pair_leaves(
    entry: Entry, templates: Mapping[str, flatten.FlatItem], changes: plan.Changes
) -> tuple[plan.RestorePlan, list[Names], Replan]:
    """What a restore of one step would do, the names of the state's leaves, and a way to ask with more surgery."""
    stored = entry.manifest.contents.get_process_items(*group.get_process_index_and_count()) if entry.manifest else {}
    here = [to_names((item, *leaf.path)) for item, flat in templates.items() for leaf in flat.leaves]

    def replan(more: Sequence[Operation]) -> plan.RestorePlan:
        return plan.make_restore_plan(stored, templates, dataclasses.replace(changes, surgery=changes.surgery + more))

    return replan(()), here, replan


def _make_rejected_candidate(entry: Entry, error: StepDamagedError) -> Candidate:
    if entry.state == "unverified":
        reason = "written by plain Orbax and never proved; ct.adopt(directory) takes it over"
        return Candidate(step=entry.step, verdict="unverified", reason=reason)
    if entry.path.is_dir() and not any(entry.path.iterdir()):
        return Candidate(step=entry.step, verdict="empty", reason="an empty folder, never a step")
    return Candidate(
        step=entry.step,
        verdict=_classify_damage(error),
        reason=error.what,
        leaves=error.leaves,
        files=error.files,
        source=_get_source(entry),
    )


def _classify_damage(error: StepDamagedError) -> Literal["incomplete", "corrupt", "rejected"]:
    if isinstance(error, StepRejectedError):
        return "rejected"
    return "incomplete" if isinstance(error, IncompleteStepError) else "corrupt"


def _get_source(entry: Entry) -> Literal["local", "mirror"]:
    return "local" if entry.fetch is None else "mirror"


def _quarantine_damaged(run: RunDirectory | None, attempts: Sequence[tuple[Entry, Candidate]]) -> list[Candidate]:
    """The rejected candidates, with the damaged ones moved out of the way if that is possible."""
    candidates = []
    for entry, candidate in attempts:
        if run is not None and candidate.verdict in ("incomplete", "corrupt") and candidate.source == "local":
            candidate = dataclasses.replace(candidate, moved_to=run.quarantine(entry.path))
        candidates.append(candidate)
    return candidates


def _suggest_fix(verdicts: Set[str]) -> str:
    """What to do where no step can be restored."""
    if "rejected" in verdicts:
        return (
            "the rejected steps are as they were saved: undo what has changed in the validation function, its batch "
            "or the model's code, or open the run without validate= if it was meant."
        )
    if "unverified" in verdicts:
        return "ct.adopt(directory) takes over the steps of plain Orbax."
    return "see what ct.repair(directory, dry_run=True) can do, or choose another directory for a new run."


def make_no_intact_step_error(report: RestoreReport, directory: pathlib.Path) -> NoIntactStepError:
    """The error for a directory that holds steps and none that can be restored."""
    lines = "".join(f"\n    {line}" for each in report.candidates for line in str(each).splitlines())
    verdicts = {candidate.verdict for candidate in report.candidates}
    error = NoIntactStepError(
        what=f"none of the {len(report.candidates)} step(s) in {directory} can be restored:{lines}",
        why="starting afresh here would bury the run; nothing was deleted.",
        fix=_suggest_fix(verdicts),
    )
    error.report = report
    return error
