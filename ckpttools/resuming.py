# SPDX-License-Identifier: Apache-2.0
"""What a session goes on from: the nearest intact step, of its own folder or of its mirror, proved and not yet placed.

Sits on `recovery`, which knows one list of candidates; here it is put together with what a session adds: other
processes, a mirror, a validation function, versions and surgery.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

from . import joint, meeting, recovery, validation, versions
from .errors import SpecError
from .fetching import Fetcher
from .group import Group
from .mirroring import Copier
from .recovery import BestStep, Loaded, Selector
from .report import Candidate, RestoreReport
from .spec.spec import CheckpointSpec
from .spec.surgery import Surgery
from .store.catalogue import Entry
from .store.run import RunFolder

type _Load = Callable[[list[Entry]], tuple[Loaded | None, list[Candidate]]]


def best_of(spec: CheckpointSpec) -> BestStep:
    """The selector for the first metric that a spec gives a direction to.

    Raises:
        SpecError: If it names none.
    """
    named = spec.directed_metrics()
    if not named:
        raise SpecError(
            what="the spec names no metric.",
            why="without one there is no best step.",
            fix='ckpt.best_step("val_loss", mode="min")',
        )
    metric, mode = next(iter(named.items()))
    return BestStep(metric, mode)


def directed(spec: CheckpointSpec, selector: BestStep) -> BestStep:
    """The selector with its direction, which the spec may know.

    Raises:
        SpecError: If nobody knows it.
    """
    mode = selector.mode or spec.directed_metrics().get(selector.metric)
    if mode is None:
        raise SpecError(
            what=f"it is not known whether a small or a large {selector.metric!r} is better.",
            why="the spec does not name this metric, and guessing would choose the worst step.",
            fix=f'ct.best({selector.metric!r}, mode="min")',
        )
    return BestStep(selector.metric, mode)


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
        alter=functools.partial(versions.changes, spec, surgery=surgery),
        together=recovery.alone if group.count == 1 else joint.restoring(group),
    )
    if copier is None:
        loaded, tried = load_from(meeting.candidates(group, run, step))
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
