# SPDX-License-Identifier: Apache-2.0
"""Which steps a restore tries, and in which order: the latest, one by its number, or the best by a metric."""

import dataclasses
from typing import Any, Literal

import numpy as np

from ..errors import SpecError, StepNotFoundError
from ..spec.retention import rank_steps
from ..spec.spec import CheckpointSpec
from ..store.catalogue import Catalogue, Entry


@dataclasses.dataclass(frozen=True)
class BestStep:
    """Asks `restore` for the step with the best value of a metric; made by `ct.best`."""

    metric: str
    mode: Literal["min", "max"] | None = None


type Selector = Literal["latest"] | int | BestStep


def require_selector(selector: Any) -> None:
    """Raise `SpecError` unless it names a step: what was meant as a number must not pass for the latest."""
    if type(selector) is int or isinstance(selector, BestStep) or (type(selector) is str and selector == "latest"):
        return
    raise SpecError(
        what=f"step={selector!r:.100} names no step to restore.",
        why='a step is "latest", an int, or ct.best(metric); anything else would have to be guessed.',
        fix=f"step={int(selector)}" if isinstance(selector, np.integer) else 'step="latest", step=500, ct.best("loss")',
    )


def list_candidates(catalogue: Catalogue, selector: Selector) -> list[Entry]:
    """The candidates for a selector, the one to try first in front."""
    require_selector(selector)
    if isinstance(selector, int):
        return _find_numbered_step(catalogue, selector)
    if isinstance(selector, BestStep):
        return _rank_by_metric(catalogue, selector)
    live = {entry.path for entry in catalogue.live_entries}
    tried = [entry for entry in catalogue.entries if entry.path in live or entry.state != "committed"]
    # A kill between the two moves of a branch's first commit: what was moved aside is not superseded yet.
    tried += [entry for entry in catalogue.moved_entries if entry.path in live]
    # Damaged steps have no readable sequence, so they stand where their number puts them.
    return sorted(tried, key=lambda entry: entry.step, reverse=True)


def _find_numbered_step(catalogue: Catalogue, step: int) -> list[Entry]:
    found = [entry for entry in (*catalogue.entries, *catalogue.moved_entries) if entry.step == step]
    if not found:
        raise StepNotFoundError(
            what=f"there is no step {step}.",
            why="it was never saved, or retention has deleted it.",
            fix=f"there are {', '.join(str(entry.step) for entry in catalogue.entries) or 'no steps'}.",
        )
    return found[:1]


def _rank_by_metric(catalogue: Catalogue, selector: BestStep) -> list[Entry]:
    entries = {entry.info.sequence: entry for entry in catalogue.live_entries if entry.info}
    best = rank_steps([entry.info for entry in entries.values() if entry.info], selector.metric, selector.mode or "min")
    if not best:
        names = sorted({name for entry in entries.values() if entry.info for name in entry.info.metrics})
        raise StepNotFoundError(
            what=f"no step has recorded the metric {selector.metric!r}.",
            why="the best step is chosen by the metrics that were passed along with the steps.",
            fix=f"recorded: {', '.join(names) or 'none'}.",
        )
    return [entries[info.sequence] for info in best]


def make_best_selector(spec: CheckpointSpec) -> BestStep:
    """The selector for the first metric that a spec gives a direction to.

    Raises:
        SpecError: If it names none.
    """
    named = spec.get_metric_modes()
    if not named:
        raise SpecError(
            what="the spec names no metric.",
            why="without one there is no best step.",
            fix='ckpt.best_step("val_loss", mode="min")',
        )
    metric, mode = next(iter(named.items()))
    return BestStep(metric, mode)


def resolve_mode(spec: CheckpointSpec, selector: BestStep) -> BestStep:
    """The selector with its direction, which the spec may know.

    Raises:
        SpecError: If nobody knows it.
    """
    mode = selector.mode or spec.get_metric_modes().get(selector.metric)
    if mode is None:
        raise SpecError(
            what=f"it is not known whether a small or a large {selector.metric!r} is better.",
            why="the spec does not name this metric, and guessing would choose the worst step.",
            fix=f'ct.best({selector.metric!r}, mode="min")',
        )
    return BestStep(selector.metric, mode)


def best(metric: str, mode: Literal["min", "max"] | None = None) -> BestStep:
    """For `restore(step=...)`: the step with the best value of a metric; the spec knows the mode if it names it."""
    return BestStep(metric, mode)
