# SPDX-License-Identifier: Apache-2.0
"""Choose which steps a restore tries first: the latest, one by its number, or the best by a metric."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from ..errors import SpecError, StepNotFoundError
from ..spec.retention import rank_steps
from ..spec.spec import CheckpointSpec
from ..store.catalogue import Catalogue, Entry, is_live
from ..store.manifest import Lineage


@dataclasses.dataclass(frozen=True)
class BestStep:
    """Selects the step with the best value of a metric; made by `ct.best`.

    Attributes:
        metric: Name of a recorded metric.
        mode: "min" or "max"; None to take it from the spec.
    """

    metric: str
    mode: Literal["min", "max"] | None = None


@dataclasses.dataclass(frozen=True)
class BranchStep:
    """Select a step by its number and its branch, for a number that is on two branches.

    Attributes:
        step: The number.
        branch: Name of the branch, as shown by `ct.ls` and `ckpttools ls`.

    Example:
        >>> import tempfile, jax.numpy as jnp, ckpttools as ct
        >>> directory = tempfile.mkdtemp()
        >>> with ct.open(ct.CheckpointSpec(directory=directory)) as ckpt:
        ...     for step in (1, 2):
        ...         _ = ckpt.save(step, {"model": {"w": jnp.array([step, step])}})
        ...     _ = ckpt.restore({"model": {"w": jnp.zeros(2, int)}}, step=1)
        ...     _ = ckpt.save(2, {"model": {"w": jnp.array([-2, -2])}})
        >>> first, superseded, live = ct.ls(directory)
        >>> ct.load(directory, {"model": {"w": jnp.zeros(2, int)}}, step=ct.BranchStep(2, superseded.branch)).state
        {'model': {'w': Array([2, 2], dtype=int32)}}
    """

    step: int
    branch: str


type Selector = Literal["latest"] | int | BestStep | BranchStep


def require_selector(selector: Any) -> None:
    """Raise `SpecError` unless `selector` is valid: a mistyped number must not restore the latest step."""
    if type(selector) is int or isinstance(selector, BestStep | BranchStep):
        return
    if type(selector) is str and selector == "latest":
        return
    raise SpecError(
        what=f"step={selector!r:.100} does not select a step.",
        why='a step is "latest", an int, or ct.best(metric); anything else would have to be guessed.',
        fix=f"step={int(selector)}" if isinstance(selector, np.integer) else 'step="latest", step=500, ct.best("loss")',
    )


def list_candidates(catalogue: Catalogue, selector: Selector) -> list[Entry]:
    """Return the candidates for a selector in the order in which they are tried.

    Args:
        catalogue: The steps to choose from.
        selector: "latest", a number, a `BranchStep`, or a `BestStep` with a mode.

    Raises:
        StepNotFoundError: If the numbered step does not exist, or no step has the metric.
        SpecError: If the selector is not valid.
    """
    require_selector(selector)
    if isinstance(selector, int):
        return _find_numbered_step(catalogue, selector)
    if isinstance(selector, BestStep):
        return _rank_by_metric(catalogue, selector)
    if isinstance(selector, BranchStep):
        return _find_branch_step(catalogue, selector)
    return _list_latest(catalogue)


def _list_latest(catalogue: Catalogue) -> list[Entry]:
    live = {entry.path for entry in catalogue.live_entries}
    tried = [entry for entry in catalogue.entries if entry.path in live or _may_be_live(entry, catalogue.lineage)]
    # After a kill between the two moves of a branch's first commit, the step moved aside is still live.
    tried += [entry for entry in catalogue.moved_entries if entry.path in live]
    if not tried and (catalogue.entries or catalogue.moved_entries):
        raise StepNotFoundError(
            what="the run has no live steps: they were deleted or are in quarantine.",
            why="only superseded steps exist, and a run must not silently return to a superseded branch.",
            fix=f"ckpt.restore(state, step=...) takes a number; available: {list_available_steps(catalogue)}.",
        )
    # Damaged steps have no readable sequence, so the order is by number.
    return sorted(tried, key=lambda entry: entry.step, reverse=True)


def _may_be_live(entry: Entry, lineage: Lineage) -> bool:
    """Return whether an uncommitted step may be live, judged by its second copy if there is one."""
    if entry.state == "committed":
        return False
    return entry.spare_summary is None or is_live(entry.spare_summary, lineage)


def _find_numbered_step(catalogue: Catalogue, step: int) -> list[Entry]:
    found = select_one_branch([each for each in (*catalogue.entries, *catalogue.moved_entries) if each.step == step])
    if not found:
        raise StepNotFoundError(
            what=f"step {step} does not exist.",
            why="it was never saved, or retention has deleted it.",
            fix=f"available: {list_available_steps(catalogue)}.",
        )
    return found[:1]


def _find_branch_step(catalogue: Catalogue, selector: BranchStep) -> list[Entry]:
    numbered = [each for each in (*catalogue.entries, *catalogue.moved_entries) if each.step == selector.step]
    found = [each for each in numbered if each.lineage and each.lineage[-1][0] == selector.branch]
    if not found:
        branches = sorted({each.lineage[-1][0] for each in numbered if each.lineage})
        raise StepNotFoundError(
            what=f"step {selector.step} of branch {selector.branch!r} does not exist.",
            why="it was never saved, or retention has deleted it.",
            fix=f"branches with this step: {', '.join(branches)}."
            if branches
            else f"available: {list_available_steps(catalogue)}.",
        )
    return found


def format_selector(catalogue: Catalogue, entry: Entry) -> str:
    """Return the code of the selector for an entry: its number, unless that selects a step of another branch."""
    first = _find_numbered_step(catalogue, entry.step)[0]
    return str(entry.step) if first is entry else f"ct.BranchStep({entry.step}, {entry.lineage[-1][0]!r})"


def select_one_branch(entries: Sequence[Entry]) -> list[Entry]:
    """Select, among entries with one number, those of one branch: a step and its copies.

    A restore by number tries the copies of one step, but never another branch. The live step is preferred, then a
    damaged one, since it may be live, then the superseded step that was committed last.
    """
    live = [entry for entry in entries if entry.info and not entry.info.superseded]
    superseded = sorted(
        (entry for entry in entries if entry.info and entry.info.superseded),
        key=lambda entry: entry.info.sequence if entry.info else 0,
        reverse=True,
    )
    damaged = [entry for entry in entries if entry.info is None]
    chosen = next(iter([*live, *damaged, *superseded]), None)
    if chosen is None or not chosen.lineage:
        return [*([] if chosen is None else [chosen]), *(each for each in damaged if each is not chosen)]
    same = [each for each in entries if each.lineage[-1:] == chosen.lineage[-1:]]
    return [*(each for each in damaged if not each.lineage), *same]


def list_available_steps(catalogue: Catalogue) -> str:
    """Return the steps that can be requested by number, for an error; superseded ones after the others."""
    superseded = {entry.step for entry in catalogue.superseded_entries}
    others = {entry.step for entry in catalogue.live_entries}
    others |= {entry.step for entry in catalogue.entries if entry.state != "committed"}
    parts = [", ".join(map(str, sorted(others)))] if others else []
    parts += [f"superseded: {', '.join(map(str, sorted(superseded)))}"] if superseded else []
    return "; ".join(parts) or "no steps"


def _rank_by_metric(catalogue: Catalogue, selector: BestStep) -> list[Entry]:
    entries = {entry.info.sequence: entry for entry in catalogue.live_entries if entry.info}
    best = rank_steps([entry.info for entry in entries.values() if entry.info], selector.metric, selector.mode or "min")
    if not best:
        names = sorted({name for entry in entries.values() if entry.info for name in entry.info.metrics})
        raise StepNotFoundError(
            what=f"no step has a recorded metric {selector.metric!r}.",
            why="the best step is chosen by the metrics that were passed to save.",
            fix=f"recorded: {', '.join(names) or 'none'}.",
        )
    return [entries[info.sequence] for info in best]


def make_best_selector(spec: CheckpointSpec) -> BestStep:
    """Return the selector for the first metric whose mode the spec names.

    Raises:
        SpecError: If the spec names no metric.
    """
    named = spec.get_metric_modes()
    if not named:
        raise SpecError(
            what="the spec names no metric.",
            why="the best step is chosen by a metric.",
            fix='ckpt.best_step("val_loss", mode="min")',
        )
    metric, mode = next(iter(named.items()))
    return BestStep(metric, mode)


def resolve_mode(spec: CheckpointSpec, selector: BestStep) -> BestStep:
    """Return the selector with its mode, taken from the spec if it has none.

    Raises:
        SpecError: If neither names the mode.
    """
    mode = selector.mode or spec.get_metric_modes().get(selector.metric)
    if mode is None:
        raise SpecError(
            what=f"ct.best({selector.metric!r}) has no mode.",
            why="the spec does not name this metric, and a wrong guess would choose the worst step.",
            fix=f'ct.best({selector.metric!r}, mode="min")',
        )
    return BestStep(selector.metric, mode)


def best(metric: str, mode: Literal["min", "max"] | None = None) -> BestStep:
    """Select the step with the best value of a metric, for `restore(step=...)` and `ct.load(step=...)`.

    Args:
        metric: Name of a metric that was passed to `save`.
        mode: "min" or "max"; None to take it from the spec, if it names the metric.

    Example:
        >>> import ckpttools as ct
        >>> ct.best("val_loss", mode="min")
        BestStep(metric='val_loss', mode='min')
    """
    return BestStep(metric, mode)
