# SPDX-License-Identifier: Apache-2.0
"""What a session goes on from: the nearest intact step, of its own folder or of its mirror, proved and not yet placed.

Sits on `recovery`, which knows one list of candidates; here it is put together with what a session adds: other
processes, a mirror, a validation function, versions and surgery.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

from ..mirror.fetch import Fetcher
from ..mirror.upload import Copier
from ..processes.group import Group
from ..restore import multiprocess_restore, recovery, validation
from ..restore.recovery import Loaded
from ..restore.report import Candidate, RestoreReport
from ..restore.select import BestStep, Selector, directed
from ..spec.spec import CheckpointSpec
from ..spec.surgery import Surgery
from ..store.catalogue import Entry
from ..store.run_directory import RunFolder
from ..surgery import migrations

type _Load = Callable[[list[Entry]], tuple[Loaded | None, list[Candidate]]]


def load(
    state: Mapping[str, Any],
    step: Selector,
    *,
    spec: CheckpointSpec,
    run: RunFolder,
    group: Group,
    copier: Copier | None,
    validate: validation.Validate | None,
    surgery: Surgery,
) -> tuple[Loaded | None, RestoreReport]:
    """The nearest intact step on the host, None without one, and the report of what was looked at."""
    if isinstance(step, BestStep):
        step = directed(spec, step)

    def check(loaded: Loaded) -> None:
        if validate is not None:
            outputs = loaded.manifest.contents.outputs
            validation.check(validate, state, loaded.items, outputs, step=loaded.entry.step)

    load_from = functools.partial(
        recovery.load_first_intact,
        state=state,
        check=check,
        run=run if group.leads else None,
        # A step that was asked for by number is the only one; its damage is raised rather than passed over.
        asked=isinstance(step, int),
        alter=functools.partial(migrations.changes, spec, surgery=surgery),
        together=recovery.alone if group.count == 1 else multiprocess_restore.restoring(group),
    )
    if copier is None:
        loaded, tried = load_from(multiprocess_restore.candidates(group, run, step))
        mirror_error = ""
    else:
        loaded, tried, mirror_error = _nearest(Fetcher(run, copier.mirror, copier.store), step, load_from)
    return loaded, RestoreReport(step=None, state=dict(state), candidates=tuple(tried), mirror_error=mirror_error)


def _nearest(fetcher: Fetcher, step: Selector, load_from: _Load) -> tuple[Loaded | None, list[Candidate], str]:
    """The nearest intact step, what was tried, and why the mirror could not be asked."""
    try:
        loaded, tried = load_from(fetcher.candidates(step))
        if loaded is not None:
            fetcher.settle(loaded.entry)
    finally:
        fetcher.clean()
    return loaded, tried, "" if fetcher.error is None else fetcher.error.what
