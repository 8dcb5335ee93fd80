# SPDX-License-Identifier: Apache-2.0
"""Choose which steps a restore tries first: the latest, one by its number, or the best by a metric."""

import dataclasses
from typing import Any, Literal

import numpy as np

from ..errors import SpecError, StepNotFoundError
from ..spec.retention import rank_steps
from ..spec.spec import CheckpointSpec
from ..store.catalogue import Catalogue, Entry


@dataclasses.dataclass(frozen=True)
class BestStep:
    """Selects the step with the best value of a metric; made by `ct.best`.

    Attributes:
        metric: Name of a recorded metric.
        mode: "min" or "max"; None to take it from the spec.
    """

    metric: str
    mode: Literal["min", "max"] | None = None


type Selector = Literal["latest"] | int | BestStep


def require_selector(selector: Any) -> None:
    """Raise `SpecError` unless `selector` is valid: a mistyped number must not restore the latest step."""
    if type(selector) is int or isinstance(selector, BestStep) or (type(selector) is str and selector == "latest"):
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
        selector: "latest", a number, or a `BestStep` with a mode.

    Raises:
        StepNotFoundError: If the numbered step does not exist, or no step has the metric.
        SpecError: If the selector is not valid.
    """
    require_selector(selector)
    if isinstance(selector, int):
        return _find_numbered_step(catalogue, selector)
    if isinstance(selector, BestStep):
        return _rank_by_metric(catalogue, selector)
    live = {entry.path for entry in catalogue.live_entries}
    tried = [entry for entry in catalogue.entries if entry.path in live or entry.state != "committed"]
    # After a kill between the two moves of a branch's first commit, the step moved aside is still live.
    tried += [entry for entry in catalogue.moved_entries if entry.path in live]
    # Damaged steps have no readable sequence, so the order is by number.
    return sorted(tried, key=lambda entry: entry.step, reverse=True)


def _find_numbered_step(catalogue: Catalogue, step: int) -> list[Entry]:
    found = [entry for entry in (*catalogue.entries, *catalogue.moved_entries) if entry.step == step]
    if not found:
        raise StepNotFoundError(
            what=f"step {step} does not exist.",
            why="it was never saved, or retention has deleted it.",
            fix=f"available: {', '.join(str(entry.step) for entry in catalogue.entries) or 'no steps'}.",
        )
    return found[:1]


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
