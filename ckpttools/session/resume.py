# SPDX-License-Identifier: Apache-2.0
"""What a session goes on from: the nearest intact step, of its own folder or of its mirror, proved and not yet placed.

Sits on `recovery`, which knows one list of candidates; here it is put together with what a session adds: other
processes, a mirror, a validation function, versions and surgery.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

from ..mirror.fetch import Fetcher
from ..mirror.upload import MirrorUploader
from ..processes.group import Group
from ..restore import multiprocess_restore, recovery, validation
from ..restore.recovery import LoadedStep
from ..restore.report import Candidate, RestoreReport
from ..restore.select import BestStep, Selector, resolve_mode
from ..spec.spec import CheckpointSpec
from ..spec.surgery import Surgery
from ..store.catalogue import Entry
from ..store.run_directory import RunDirectory
from ..surgery import migrations

type _LoadCandidates = Callable[[list[Entry]], tuple[LoadedStep | None, list[Candidate]]]


def load(
    state: Mapping[str, Any],
    step: Selector,
    *,
    spec: CheckpointSpec,
    run: RunDirectory,
    group: Group,
    uploader: MirrorUploader | None,
    validate: validation.Validate | None,
    surgery: Surgery,
) -> tuple[LoadedStep | None, RestoreReport]:
    """The nearest intact step on the host, None without one, and the report of what was looked at."""
    if isinstance(step, BestStep):
        step = resolve_mode(spec, step)

    def check(loaded: LoadedStep) -> None:
        if validate is not None:
            outputs = loaded.manifest.contents.outputs
            validation.check(validate, state, loaded.items, outputs, step=loaded.entry.step)

    load_from = functools.partial(
        recovery.load_first_intact,
        state=state,
        check=check,
        run=run if group.is_leader else None,
        # A step that was asked for by number is the only one; its damage is raised rather than passed over.
        is_explicit=isinstance(step, int),
        get_changes=functools.partial(migrations.get_changes, spec, surgery=surgery),
        coordinate=recovery.run_attempt if group.count == 1 else multiprocess_restore.make_coordinator(group),
    )
    if uploader is None:
        loaded, tried = load_from(multiprocess_restore.list_candidates(group, run, step))
        mirror_error = ""
    else:
        loaded, tried, mirror_error = _load_nearest(Fetcher(run, uploader.mirror, uploader.store), step, load_from)
    return loaded, RestoreReport(step=None, state=dict(state), candidates=tuple(tried), mirror_error=mirror_error)


def _load_nearest(
    fetcher: Fetcher, step: Selector, load_candidates: _LoadCandidates
) -> tuple[LoadedStep | None, list[Candidate], str]:
    """The nearest intact step, what was tried, and why the mirror could not be asked."""
    try:
        loaded, tried = load_candidates(fetcher.list_candidates(step))
        if loaded is not None:
            fetcher.commit(loaded.entry)
    finally:
        fetcher.clean_up()
    return loaded, tried, "" if fetcher.error is None else fetcher.error.what
