# SPDX-License-Identifier: Apache-2.0
"""Try candidates in order until one is intact, and only then touch the live state.

`select` says which steps are tried first. Damage (incomplete, corrupt) and what the run's validation rejects is skipped
and reported. A structure that does not fit and a disk that does not answer are raised, because the next candidate would
not help. A directory that holds steps but no intact one raises: it never looks like a fresh start.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from typing import Any, Literal

from ..errors import IncompleteStepError, MirrorError, NoIntactStepError, StepDamagedError, StepRejectedError
from ..store.catalogue import Catalogue, Entry
from ..store.run_directory import RunDirectory
from ..tree import flatten
from .read_step import GetChanges, LoadedStep, get_no_changes, read_step
from .report import Candidate, RestoreReport
from .select import format_selector

type Check = Callable[[LoadedStep], None]
"""A further check on a loaded step; raises `StepDamagedError` to reject it."""


type Attempt = Callable[[], tuple[LoadedStep, list[Candidate]]]


type Coordinator = Callable[[Entry, Attempt], tuple[LoadedStep, list[Candidate]]]


def run_attempt(entry: Entry, attempt: Attempt) -> tuple[LoadedStep, list[Candidate]]:
    """Run an attempt in a single process, without coordination."""
    return attempt()


def load_first_intact(
    candidates: Iterable[Entry],
    state: Mapping[str, Any],
    *,
    check: Check,
    run: RunDirectory | None,
    is_explicit: bool = False,
    get_changes: GetChanges = get_no_changes,
    coordinate: Coordinator = run_attempt,
) -> tuple[LoadedStep | None, list[Candidate]]:
    """Return the first candidate whose bytes are intact, and a record of all that were tried.

    Args:
        candidates: Steps in the order in which they are tried.
        state: The state to restore, as a template.
        check: A further check on a loaded step.
        run: The run; its damaged steps are quarantined unless another process writes to it. None to move nothing.
        is_explicit: Whether the candidates are copies of one requested step, whose damage is raised.
        get_changes: Returns what may be changed in a step so that it fits.
        coordinate: Runs an attempt so that all processes agree on its outcome.

    Raises:
        StepDamagedError: If `is_explicit` and no copy of the step is intact.
        StructureError: If an intact step does not fit the template.
        StorageError: If the disk does not answer.
        MirrorError: If the mirror does not answer and no candidate is intact.
    """
    tried: list[tuple[Entry, Candidate]] = []
    first: StepDamagedError | None = None
    unreachable: MirrorError | None = None
    for entry in candidates:
        try:
            loaded, (used,) = coordinate(
                entry, functools.partial(load_candidate, entry, state, check=check, get_changes=get_changes)
            )
        except StepDamagedError as error:
            tried.append((entry, _make_rejected_candidate(entry, error)))
            first = first or error
            continue
        except MirrorError as error:
            # A store that stops answering half way may still hold intact steps.
            tried.append((entry, Candidate(step=entry.step, verdict="unreachable", reason=error.what, source="mirror")))
            unreachable = unreachable or error
            continue
        # Only now: if no step is intact, none is moved, or the next start would find an empty directory.
        return loaded, [*_quarantine_damaged(run, tried), _add_superseded_steps(run, entry, used)]
    if unreachable is not None:
        raise unreachable
    if is_explicit and first is not None:
        raise first
    return None, [candidate for _, candidate in tried]


def load_candidate(
    entry: Entry, state: Mapping[str, Any], *, check: Check, get_changes: GetChanges = get_no_changes
) -> tuple[LoadedStep, list[Candidate]]:
    """Load and check one candidate.

    Raises:
        StepDamagedError: If it is damaged, or `check` rejects it.
    """
    if entry.fetch is not None:
        entry.fetch()
    loaded = read_step(
        entry, {item: flatten.flatten_item(value, template=True) for item, value in state.items()}, get_changes
    )
    check(loaded)
    branch = entry.lineage[-1][0] if entry.lineage else ""
    superseded = entry.info is not None and entry.info.superseded
    used = Candidate(step=entry.step, verdict="used", source=_get_source(entry), branch=branch, superseded=superseded)
    return loaded, [used]


def _add_superseded_steps(run: RunDirectory | None, entry: Entry, used: Candidate) -> Candidate:
    """Return the candidate that was used, with the live steps that the next save supersedes."""
    if run is None:
        return used
    return dataclasses.replace(used, supersedes=run.list_superseded_by(entry.step, entry.lineage))


def _make_rejected_candidate(entry: Entry, error: StepDamagedError) -> Candidate:
    if entry.state == "unverified":
        reason = "written by plain Orbax and never verified; ct.adopt(directory) adopts it"
        return Candidate(step=entry.step, verdict="unverified", reason=reason)
    if entry.path.is_dir() and not any(entry.path.iterdir()):
        return Candidate(step=entry.step, verdict="empty", reason="an empty directory, never a step")
    return Candidate(
        step=entry.step,
        verdict=_classify_damage(error),
        reason=error.what,
        leaves=error.leaves,
        files=error.files,
        source=_get_source(entry),
        branch=entry.lineage[-1][0] if entry.lineage else "",
    )


def _classify_damage(error: StepDamagedError) -> Literal["incomplete", "corrupt", "rejected"]:
    if isinstance(error, StepRejectedError):
        return "rejected"
    return "incomplete" if isinstance(error, IncompleteStepError) else "corrupt"


def _get_source(entry: Entry) -> Literal["local", "mirror"]:
    return "local" if entry.fetch is None else "mirror"


def _quarantine_damaged(run: RunDirectory | None, attempts: Sequence[tuple[Entry, Candidate]]) -> list[Candidate]:
    """Return the rejected candidates after moving damaged local ones to quarantine where possible."""
    candidates = []
    for entry, candidate in attempts:
        if run is not None and candidate.verdict in ("incomplete", "corrupt") and candidate.source == "local":
            candidate = dataclasses.replace(candidate, moved_to=run.quarantine(entry))
        candidates.append(candidate)
    return candidates


def _suggest_fix(verdicts: Set[str]) -> str:
    """Return what to do if no step can be restored."""
    if "rejected" in verdicts:
        return (
            "the rejected steps are as they were saved: undo the change in the validation function, its batch "
            "or the model's code; if the change is intended, open the run without validate=."
        )
    if "unverified" in verdicts:
        return "ct.adopt(directory) adopts the steps of plain Orbax."
    return "ct.repair(directory, dry_run=True) shows what can be repaired; a new run needs another directory."


def make_no_intact_step_error(report: RestoreReport, name: pathlib.Path | str, steps: Catalogue) -> NoIntactStepError:
    """Return the error for a directory with steps of which none can be restored.

    It lists the superseded steps, which are restored only on request: a run must not silently return to a superseded
    branch.

    Args:
        report: What was tried.
        name: Where the steps are.
        steps: All steps at that location.
    """
    lines = [line for each in report.candidates for line in str(each).splitlines()]
    fix, tried = _suggest_fix({candidate.verdict for candidate in report.candidates}), "step(s)"
    left = sorted(steps.superseded_entries, key=lambda entry: entry.step)
    if left:
        lines += [f"step {each.step}: committed, but superseded (branch {each.lineage[-1][0]})" for each in left]
        code, tried = format_selector(steps, left[-1]), "live step(s)"
        fix = f"ckpt.restore(state, step={code}) returns to the superseded branch; otherwise, {fix}"
    error = NoIntactStepError(
        what="\n    ".join([f"none of the {len(report.candidates)} {tried} in {name} can be restored:", *lines]),
        why="a fresh start here would bury the run; nothing was deleted.",
        fix=fix,
    )
    error.report = report
    return error
