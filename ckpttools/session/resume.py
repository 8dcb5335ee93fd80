# SPDX-License-Identifier: Apache-2.0
"""Restore a session's run: find the nearest intact step here or at the mirror, fill the state, and continue from it.

Sits on `restore.first_intact`, which tries a list of candidates; a session adds other processes, a mirror, a validation
function, versions of the state, and surgery.
"""

import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from ..mirror.fetch import Fetcher
from ..restore import first_intact, multiprocess_restore, validation
from ..restore.read_step import LoadedStep
from ..restore.report import Candidate, RestoreReport
from ..restore.select import BestStep, BranchStep, Selector, resolve_mode
from ..spec.operations import Operation, as_code
from ..spec.surgery import Surgery
from ..spec.trigger_memory import decode_memory
from ..store.catalogue import MAX_LISTINGS, Entry, is_intact_again, were_deleted
from ..surgery import migrations
from ..surgery.altered_leaves import list_altered_leaves
from ..tree.items import require_items
from ..tree.write_back import fill_state
from .advice import advise_on_retention, warn
from .loop import TrainingLoop
from .resources import RunResources

type _LoadCandidates = Callable[[list[Entry]], tuple[LoadedStep | None, list[Candidate]]]


def restore(
    resources: RunResources, loop: TrainingLoop, state: Mapping[str, Any], step: Selector, surgery: Iterable[Operation]
) -> RestoreReport:
    """Fill a state from a step, and continue the run from that step; see `Session.restore`.

    Args:
        resources: The open run.
        loop: The session's loop, which continues from the restored step.
        state: Items by name.
        step: "latest", a number, or a `BestStep`.
        surgery: What to do to a step that does not fit.
    """
    start_time = time.monotonic()
    changes = Surgery(surgery)
    require_items(state)
    loop.saver.wait()
    loop.wait_for_other_writer()
    next_sequence = resources.run.refresh_steps().next_sequence
    loaded, report = _load(resources, state, step, changes)
    if resources.uploader is not None:
        next_sequence = resources.run.get_steps().next_sequence  # A copy that was fetched is a commit, too.
    if report.mirror_error:
        warn(f"only local steps were considered: {report.mirror_error}")
    operations = tuple(map(as_code, changes))
    if loaded is None:
        if any(candidate.verdict != "empty" for candidate in report.candidates):
            raise first_intact.make_no_intact_step_error(report, resources.directory, resources.run.get_steps())
        # A state that starts here already has the new structure.
        loop.progress.begin(surgery=operations, next_sequence=next_sequence)
        return report
    # No step may be saved while the state is replaced: after an interrupt, the state of one step could be saved under
    # the number of another.
    position = loop.progress.suspend()
    try:
        filled = fill_state(state, loaded.items)
    except Exception:
        loop.progress.reinstate(position)
        raise
    summary, contents = loaded.manifest.summary, loaded.manifest.contents
    memory = decode_memory(resources.spec.save, contents.triggers)
    surgery_codes = tuple(dict.fromkeys([*contents.surgery, *operations]))
    intact_count = len(resources.run.get_steps().live_entries)
    warn(advise_on_retention(rejected_count=report.damaged, intact_count=intact_count))
    report = dataclasses.replace(
        report,
        step=summary.step,
        state=filled,
        metrics=dict(summary.metrics),
        seconds=time.monotonic() - start_time,
        altered=list_altered_leaves(loaded.plan),
    )
    # Last: a caller that is interrupted before has no report, and so lacks the arrays to continue with.
    passed_over = {each.step for each in report.candidates if each.verdict in ("incomplete", "corrupt")}
    loop.progress.begin(summary.step, summary.lineage, memory, summary.run_s, surgery_codes, next_sequence, passed_over)
    return report


def _load(
    resources: RunResources, state: Mapping[str, Any], step: Selector, surgery: Surgery
) -> tuple[LoadedStep | None, RestoreReport]:
    """The nearest intact step in host memory, None without one, and the report of what was tried."""
    spec, run, group, validate = resources.spec, resources.run, resources.group, resources.validate
    if isinstance(step, BestStep):
        step = resolve_mode(spec, step)

    def check(loaded: LoadedStep) -> None:
        if validate is not None:
            outputs = loaded.manifest.contents.outputs
            validation.check(validate, state, loaded.items, outputs, step=loaded.entry.step)

    load_from = functools.partial(
        first_intact.load_first_intact,
        state=state,
        check=check,
        run=run if group.is_leader else None,
        # A step that was requested by number is the only candidate; its damage is raised rather than passed over.
        is_explicit=isinstance(step, int | BranchStep),
        get_changes=functools.partial(migrations.get_changes, spec, surgery=surgery),
        coordinate=first_intact.run_attempt if group.count == 1 else multiprocess_restore.make_coordinator(group),
    )
    if resources.uploader is None:
        for _ in range(MAX_LISTINGS):
            candidates = multiprocess_restore.list_candidates(group, run, step)
            loaded, tried = load_from(candidates)
            is_outdated = were_deleted(candidates) if loaded is None else _was_replaced(candidates, loaded)
            if group.count > 1 or not is_outdated:
                break
        mirror_error = ""
    else:
        fetcher = Fetcher(run, resources.uploader.mirror, resources.uploader.store)
        loaded, tried, mirror_error = _load_nearest(fetcher, step, load_from)
    return loaded, RestoreReport(step=None, state=dict(state), candidates=tuple(tried), mirror_error=mirror_error)


def _was_replaced(candidates: Sequence[Entry], loaded: LoadedStep) -> bool:
    """Return whether another process replaced a step, or repaired it, after this one had passed over it."""
    return any(map(is_intact_again, itertools.takewhile(lambda entry: entry is not loaded.entry, candidates)))


def _load_nearest(
    fetcher: Fetcher, step: Selector, load_candidates: _LoadCandidates
) -> tuple[LoadedStep | None, list[Candidate], str]:
    """The nearest intact step here or at the mirror, what was tried, and the mirror's error if it has one."""
    try:
        loaded, tried = load_candidates(fetcher.list_candidates(step))
        if loaded is not None:
            fetcher.commit(loaded.entry)
    finally:
        fetcher.clean_up()
    return loaded, tried, "" if fetcher.error is None else fetcher.error.what
