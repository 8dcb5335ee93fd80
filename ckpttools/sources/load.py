# SPDX-License-Identifier: Apache-2.0
"""Load weights from any run into any state: `ct.load`, and `ct.preview` for a dry run.

The run is only read: no lock is taken, nothing is moved, and an open session is not affected. Only the leaves that are
placed are read, and verified by their digests.
"""

import dataclasses
import functools
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from remattools.text import format_table

from ..errors import SpecError, StepNotFoundError
from ..restore import first_intact, select
from ..restore.read_step import GetChanges, pair_leaves
from ..restore.report import RestoreReport
from ..restore.select import BestStep, Selector
from ..spec.operations import Operation, as_code
from ..spec.state import DEFAULT_RULES, StateVersion, as_state_version
from ..spec.surgery import Surgery
from ..store.catalogue import MAX_LISTINGS, Entry, were_deleted
from ..surgery import migrations, suggest
from ..surgery.altered_leaves import AlteredLeaf, list_altered_leaves, list_leaves
from ..surgery.plan import Changes
from ..surgery.suggestion import Suggestion
from ..tree import flatten
from ..tree.items import require_items
from ..tree.match import Difference
from ..tree.records import count_host_bytes
from ..tree.write_back import fill_state
from .foreign_snapshot import read_as_steps
from .open_source import Location, Source, make_empty_error, open_source


def load(
    source: Location,
    state: Mapping[str, Any],
    *,
    surgery: Iterable[Operation] = (),
    only: str | Sequence[str] = (),
    step: Selector = "latest",
    state_version: StateVersion | int | None = None,
) -> RestoreReport:
    """Fill a state from a step of any run, such as a pretrained one; the run is only read.

    Args:
        source: The directory of a run or of one step, a mirror or its address, or a checkpoint of Orbax or flax that
            was not adopted, which is read whole and unverified; a tree without items becomes the item "default".
        state: Items by name. Live objects are filled in place; all items are in the report's `state`.
        surgery: Operations for leaves that do not fit, such as `ct.Rename`.
        only: Patterns of the leaves to load, such as "model.encoder"; all others keep their values and are not read.
        step: "latest" (damaged steps are skipped), a number, `ct.best(metric, mode)`, or `ct.BranchStep(step, branch)`.
        state_version: The version of the state, with migrations, if the run is one of the same program. Without it,
            the step's version is ignored.

    Returns:
        A report of what was loaded; `.altered` lists the leaves that were changed or kept.

    Raises:
        StepNotFoundError: If the step does not exist.
        NoIntactStepError: If the run has steps and none is intact.
        StructureError: If the step does not fit; nothing was changed, and the error suggests surgery.
        VersionError: If the step's version is not supported.

    Example:
        >>> import tempfile, jax.numpy as jnp, ckpttools as ct
        >>> directory = tempfile.mkdtemp()
        >>> with ct.open(ct.CheckpointSpec(directory=directory)) as ckpt:
        ...     _ = ckpt.save(1, {"model": {"w": jnp.ones(2)}})
        >>> ct.load(directory, {"model": {"w": jnp.zeros(2)}}).state["model"]["w"]
        Array([1., 1.], dtype=float32)
    """
    start_time = time.monotonic()
    require_items(state)
    get_changes = _make_get_changes(surgery, only, state_version)
    for _ in range(MAX_LISTINGS):
        with open_source(source) as found:
            entries = _list_candidates(found, step)
            with read_as_steps(entries) as candidates:
                loaded, tried = first_intact.load_first_intact(
                    candidates,
                    state,
                    check=lambda loaded: None,
                    run=None,
                    is_explicit=isinstance(step, int) or found.is_single,
                    get_changes=get_changes,
                )
            if loaded is not None or not were_deleted(entries):
                break
    report = RestoreReport(step=None, state=dict(state), candidates=tuple(tried))
    if loaded is None:
        raise first_intact.make_no_intact_step_error(report, found.name, found.steps)
    filled = fill_state(state, loaded.items)
    return dataclasses.replace(
        report,
        step=loaded.entry.step,
        state=filled,
        metrics=dict(loaded.manifest.summary.metrics),
        seconds=time.monotonic() - start_time,
        altered=list_altered_leaves(loaded.plan),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preview:
    """What `ct.load` would do, leaf by leaf; no array was read.

    Attributes:
        step: The step that would be loaded.
        leaves: Every leaf of the state, and every leaf on disk that is dropped.
        differences: What does not fit, one line for each leaf; empty if the step fits.
        surgery: Suggested operations that would make it fit, including the requested ones.
        verdict: What the suggested operations would lose; "" without a suggestion.
        read_bytes: Bytes of the arrays that would be read.

    Example:
        >>> import tempfile, ckpttools as ct
        >>> spec = ct.CheckpointSpec(directory=tempfile.mkdtemp())
        >>> with ct.open(spec) as ckpt:
        ...     saved = ckpt.save(1, {"count": 1})
        >>> ct.preview(spec.directory, {"count": 0}).fits
        True
        >>> ct.preview(spec.directory, {"counter": 0}).fits
        False
    """

    step: int
    leaves: tuple[AlteredLeaf, ...]
    differences: tuple[str, ...] = ()
    surgery: tuple[Operation, ...] = ()
    verdict: str = ""
    read_bytes: int = 0

    @property
    def fits(self) -> bool:
        """Return whether the step fits."""
        return not self.differences

    def as_dict(self) -> dict[str, Any]:
        """Return the preview as plain data."""
        return {
            "step": self.step,
            "fits": self.fits,
            "read_bytes": self.read_bytes,
            "leaves": [leaf.as_dict() for leaf in self.leaves],
            "differences": list(self.differences),
            "surgery": [as_code(each) for each in self.surgery],
            "verdict": self.verdict,
        }

    def __str__(self) -> str:
        verdict = "fits" if self.fits else f"does not fit in {len(self.differences)} place(s)"
        head = f"step {self.step} {verdict}; {self.read_bytes:,} bytes would be read"
        rows = [[leaf.name, leaf.action or "restored", leaf.source, leaf.before, leaf.after] for leaf in self.leaves]
        parts = [head, *([format_table(["leaf", "action", "on disk", "stored as", "placed as"], rows)] if rows else [])]
        parts += [f"does not fit: {line}" for line in self.differences]
        parts += [f"this surgery {self.verdict}:"] if self.surgery else []
        parts += [f"would fit it: {as_code(each)}" for each in self.surgery]
        return "\n".join(parts)


def preview(
    source: Location,
    state: Mapping[str, Any],
    *,
    surgery: Iterable[Operation] = (),
    only: str | Sequence[str] = (),
    step: Selector = "latest",
    state_version: StateVersion | int | None = None,
) -> Preview:
    """Return what `ct.load` would do with the same arguments; reads manifests only and changes nothing.

    Args:
        source: The directory of a run or of one step, a mirror or its address, or a checkpoint of Orbax or flax that
            was not adopted, which is read whole and unverified; a tree without items becomes the item "default".
        state: Items by name; shapes and dtypes suffice.
        surgery: Operations for leaves that do not fit.
        only: Patterns of the leaves to load; empty for all.
        step: "latest", a number, `ct.best(metric, mode)`, or `ct.BranchStep(step, branch)`.
        state_version: The version of the state, with migrations; None to ignore the step's version.

    Raises:
        StepNotFoundError: If no step has a readable manifest.
        StructureError: If an operation matches nothing.
        VersionError: If the step's version is not supported.

    Example:
        >>> import tempfile, jax.numpy as jnp, ckpttools as ct
        >>> state, directory = {"model": {"w": jnp.ones(2)}}, tempfile.mkdtemp()
        >>> with ct.open(ct.CheckpointSpec(directory=directory)) as ckpt:
        ...     _ = ckpt.save(1, state)
        >>> ct.preview(directory, state).fits
        True
    """
    require_items(state)
    get_changes = _make_get_changes(surgery, only, state_version)
    with open_source(source) as found, read_as_steps(_list_candidates(found, step)) as candidates:
        entry = next((each for each in candidates if each.manifest is not None or each.state == "newer"), None)
    if entry is None:
        raise StepNotFoundError(
            what=f"{found.name} has no step with a readable manifest.",
            why="without a manifest, what a step holds is not known.",
            fix="ct.verify(directory) shows what is damaged.",
        )
    if entry.manifest is None and entry.error is not None:
        raise entry.error
    templates = {item: flatten.flatten_item(value, template=True) for item, value in state.items()}
    requested = get_changes(entry)
    plan, replan = pair_leaves(entry, templates, requested)
    differences: Sequence[Difference] = plan.differences
    suggestion = suggest.find_suggestion(plan, replan) if differences else Suggestion()
    unfit_names = {".".join(each.path) for each in differences}
    return Preview(
        step=entry.step,
        leaves=tuple(leaf for leaf in list_leaves(plan) if leaf.name not in unfit_names),
        differences=tuple(map(str, differences)),
        surgery=(*requested.surgery, *suggestion.operations) if suggestion else (),
        verdict=suggestion.verdict,
        read_bytes=sum(count_host_bytes(records) for records in plan.collect_records().values()),
    )


def _list_candidates(found: Source, step: Selector) -> Sequence[Entry]:
    """Return the steps to try, in their order."""
    select.require_selector(step)
    if isinstance(step, BestStep) and step.mode is None:
        raise SpecError(
            what=f"ct.best({step.metric!r}) has no mode.",
            why="ct.load has no spec that could name it.",
            fix=f'ct.best({step.metric!r}, mode="min")',
        )
    if found.is_single:
        (entry,) = found.steps.entries
        if step not in ("latest", entry.step):
            raise SpecError(
                what=f"{found.name} is step {entry.step}, and step={step!r} was requested.",
                why="one of the two would be ignored.",
                fix="leave step= out, or pass the directory of the run.",
            )
        return (entry,)
    if not found.steps.entries:
        raise make_empty_error(found)
    return select.list_candidates(found.steps, step)


def _make_get_changes(
    surgery: Iterable[Operation], only: str | Sequence[str], state_version: StateVersion | int | None
) -> GetChanges:
    requested = Surgery(surgery)
    patterns = (only,) if isinstance(only, str) else tuple(only)

    def get_changes(version: StateVersion | None, entry: Entry) -> Changes:
        needed = migrations.get_migrations(version, entry) if version is not None else ()
        # Without a spec, the step says what its run took for state.
        rules = entry.manifest.contents.exclude if entry.manifest else DEFAULT_RULES
        return Changes(migrations=needed, surgery=requested, only=patterns, exclude=rules)

    return functools.partial(get_changes, None if state_version is None else as_state_version(state_version))
