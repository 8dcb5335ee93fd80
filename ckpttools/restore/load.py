# SPDX-License-Identifier: Apache-2.0
"""Weights out of any run into any state: pretrained models, parts of models, models that have changed since.

The run is only read: no lock is taken, nothing is moved, and the program's own run knows nothing of it. Of the step,
the leaves that are placed are read and proved by their digests, and no others.
"""

import dataclasses
import functools
import os
import pathlib
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from remattools.text import format_table

from ..errors import SpecError, StepNotFoundError
from ..spec.operations import Operation, as_code
from ..spec.state_version import StateVersion, as_state_version
from ..spec.surgery import Surgery
from ..store import catalogue, layout
from ..store.catalogue import Entry
from ..surgery import migrations, suggest
from ..surgery.altered_leaves import AlteredLeaf, list_altered_leaves, list_leaves
from ..surgery.plan import Changes
from ..tree import flatten
from ..tree.items import require_items
from ..tree.match import Difference
from ..tree.records import count_host_bytes
from ..tree.write_back import fill_state
from . import recovery, select
from .report import RestoreReport
from .select import BestStep, Selector

type Source = str | os.PathLike[str]
"""A run's folder, or the folder of one step in it."""


def load(
    source: Source,
    state: Mapping[str, Any],
    *,
    surgery: Iterable[Operation] = (),
    only: str | Sequence[str] = (),
    step: Selector = "latest",
    state_version: StateVersion | int | None = None,
) -> RestoreReport:
    """Fill a state from a step of any run, such as a pretrained one; the run is only read.

    Args:
        source: The run's folder, or the folder of one step.
        state: Items by name. Live objects are filled in place; the rest is in the report's `state`.
        surgery: What to do to leaves that do not fit.
        only: Patterns of the leaves to load, such as "model.encoder"; all others keep their values and are not read.
        step: "latest" (damaged steps are passed over), a number, or `ct.best(metric, mode)`.
        state_version: The version of the state, with migrations, if the run is one of the same program. Without it
            the run's versions are not looked at.

    Returns:
        What was loaded; `.altered` lists the leaves that were changed or kept.

    Raises:
        StepNotFoundError: If there is no such step.
        NoIntactStepError: If there are steps and none is intact.
        StructureError: If the step does not fit; nothing was changed, and the surgery that would fit it is named.
        VersionError: If the step is of a version that is not known here.
    """
    began = time.monotonic()
    require_items(state)
    root, step = _locate_step(source, step)
    alter = _make_get_changes(surgery, only, state_version)
    candidates = _list_candidates(root, step)
    asked = isinstance(step, int)
    loaded, tried = recovery.load_first_intact(
        candidates, state, check=lambda loaded: None, run=None, is_explicit=asked, get_changes=alter
    )
    report = RestoreReport(step=None, state=dict(state), candidates=tuple(tried))
    if loaded is None:
        raise recovery.make_no_intact_step_error(report, root)
    filled = fill_state(state, loaded.items)
    return dataclasses.replace(
        report,
        step=loaded.entry.step,
        state=filled,
        metrics=dict(loaded.manifest.summary.metrics),
        seconds=time.monotonic() - began,
        altered=list_altered_leaves(loaded.plan),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preview:
    """What a restore or `ct.load` would do, leaf by leaf; no array was read.

    Attributes:
        step: The step it would take.
        leaves: Every leaf of the state, and every leaf on disk that is dropped.
        differences: What does not fit, one line for each leaf; empty if the restore would go on.
        surgery: Operations that would make it fit, those that were asked for included; a guess.
        read_bytes: Bytes of the arrays that would be read.
    """

    step: int
    leaves: tuple[AlteredLeaf, ...]
    differences: tuple[str, ...] = ()
    surgery: tuple[Operation, ...] = ()
    read_bytes: int = 0

    @property
    def fits(self) -> bool:
        """Whether the restore would go on."""
        return not self.differences

    def as_dict(self) -> dict[str, Any]:
        """The preview as plain data."""
        return {
            "step": self.step,
            "fits": self.fits,
            "read_bytes": self.read_bytes,
            "leaves": [leaf.as_dict() for leaf in self.leaves],
            "differences": list(self.differences),
            "surgery": [as_code(each) for each in self.surgery],
        }

    def __str__(self) -> str:
        verdict = "fits" if self.fits else f"does not fit in {len(self.differences)} place(s)"
        head = f"step {self.step} {verdict}; {self.read_bytes:,} bytes would be read"
        rows = [[leaf.name, leaf.action or "restored", leaf.source, leaf.before, leaf.after] for leaf in self.leaves]
        parts = [head, *([format_table(["leaf", "action", "on disk", "stored as", "placed as"], rows)] if rows else [])]
        parts += [f"does not fit: {line}" for line in self.differences]
        parts += [f"would fit it: {as_code(each)}" for each in self.surgery]
        return "\n".join(parts)


def preview(
    source: Source,
    state: Mapping[str, Any],
    *,
    surgery: Iterable[Operation] = (),
    only: str | Sequence[str] = (),
    step: Selector = "latest",
    state_version: StateVersion | int | None = None,
) -> Preview:
    """Say what `ct.load` would do with the same arguments; reads manifests and changes nothing.

    Raises:
        StepNotFoundError: If there is no step with a whole manifest.
        StructureError: If an operation matches nothing.
        VersionError: If the step is of a version that is not known here.
    """
    require_items(state)
    root, step = _locate_step(source, step)
    changes = _make_get_changes(surgery, only, state_version)
    entry = next(
        (each for each in _list_candidates(root, step) if each.manifest is not None or each.state == "newer"), None
    )
    if entry is None:
        raise StepNotFoundError(
            what=f"{root} has no step with a whole manifest.",
            why="what a step holds stands in its manifest.",
            fix="see ct.verify(directory), and ct.adopt(directory) for the steps of plain Orbax.",
        )
    if entry.manifest is None and entry.error is not None:
        raise entry.error
    templates = {item: flatten.flatten_item(value, template=True) for item, value in state.items()}
    wanted = changes(entry)
    plan, here, retry = recovery.pair_leaves(entry, templates, wanted)
    unfit: Sequence[Difference] = plan.differences
    mending = suggest.find_fix(plan, here, retry) if unfit else ()
    return Preview(
        step=entry.step,
        leaves=tuple(leaf for leaf in list_leaves(plan) if leaf.name not in {".".join(each.path) for each in unfit}),
        differences=tuple(map(str, unfit)),
        surgery=(*wanted.surgery, *mending) if mending else (),
        read_bytes=sum(count_host_bytes(records) for records in plan.collect_records().values()),
    )


def _locate_step(source: Source, step: Selector) -> tuple[pathlib.Path, Selector]:
    """The run and the step that are meant; `source` may be the folder of a step."""
    folder = pathlib.Path(os.path.abspath(source))
    number = layout.parse_step_number(folder.name)
    if number is not None and (folder / layout.MANIFEST).exists():
        if step not in ("latest", number):
            raise SpecError(
                what=f"{folder} is step {number}, and step={step!r} was asked for.",
                why="one of the two would be passed over.",
                fix=f"{str(folder.parent)!r} with step={step!r}, or the folder alone.",
            )
        return folder.parent, number
    if not folder.is_dir():
        raise StepNotFoundError(
            what=f"{folder} is no folder.",
            why="weights are loaded from a run, or from a step in it.",
            fix="check the path; a copy at a mirror is fetched by ct.fetch_step.",
        )
    if isinstance(step, BestStep) and step.mode is None:
        raise SpecError(
            what=f"it is not known whether a small or a large {step.metric!r} is better.",
            why="a run that is only read has no spec to ask.",
            fix=f'ct.best({step.metric!r}, mode="min")',
        )
    return folder, step


def _list_candidates(root: pathlib.Path, step: Selector) -> list[Entry]:
    found = select.list_candidates(catalogue.scan(root), step)
    if not found:
        raise StepNotFoundError(
            what=f"{root} holds no steps.",
            why="there is nothing to load; a state that was meant to be pretrained would be a fresh one.",
            fix="check the path: it is the folder that ct.open was given as directory.",
        )
    return found


def _make_get_changes(
    surgery: Iterable[Operation], only: str | Sequence[str], state_version: StateVersion | int | None
) -> recovery.GetChanges:
    wanted = Surgery(surgery)
    patterns = (only,) if isinstance(only, str) else tuple(only)

    def get_changes(version: StateVersion | None, entry: Entry) -> Changes:
        steps_up = migrations.get_migrations(version, entry) if version is not None else ()
        return Changes(migrations=steps_up, surgery=wanted, only=patterns)

    return functools.partial(get_changes, None if state_version is None else as_state_version(state_version))
