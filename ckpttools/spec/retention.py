# SPDX-License-Identifier: Apache-2.0
"""What to keep: frozen values that choose from a list of committed steps.

Pure: no disk, no clock. Each value selects the steps to keep, with reasons; `a | b` keeps what either selects.
`decide_retention` adds what no spec can delete: the newest verified step, at least two live steps, and pins.

The first save after a restore of an older step begins a branch and supersedes the later steps. Those are counted
separately: if they counted as live, the first save of a branch would delete the base of the branch.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, override

from ..errors import SpecError
from .checks import require_count, require_mode, require_name, require_positive, require_steps

MIN_KEPT_STEPS = 2
"""Live steps that are always kept: with only one, damage to it would end the run.

After the first save of a branch they are that step and the base, so the base is kept until two live steps follow it.
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepInfo:
    """What retention decides from: the facts on a committed step.

    Attributes:
        step: Completed updates.
        sequence: Number of the commit, from 1; after a rollback, its order is not that of `step`.
        saved_at: Seconds since the epoch.
        metrics: Metrics recorded with the step.
        pinned: Whether `pin` was called on it.
        superseded: Whether it is on a branch that was abandoned by resuming from an earlier step.
    """

    step: int
    sequence: int
    saved_at: float = 0.0
    metrics: Mapping[str, float] = dataclasses.field(default_factory=dict)
    pinned: bool = False
    superseded: bool = False


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Whether one step is kept, and why."""

    step: StepInfo
    keep: bool
    reason: str


class Retention:
    """Base of all retention values: `a | b` keeps what either keeps.

    Example:
        >>> keep = Latest(3) | Best("val_loss", mode="min")
        >>> isinstance(keep, Retention)
        True
    """

    def select_steps(self, steps: Sequence[StepInfo]) -> dict[int, str]:
        """Return the sequence numbers of the steps to keep, each with the reason.

        Args:
            steps: Committed steps, in the order of their commits: the live ones, or, in a second call, the superseded
                ones that the run has not passed.
        """
        raise NotImplementedError

    def select_superseded(self, steps: Sequence[StepInfo]) -> dict[int, str]:
        """Return the superseded steps to keep even after the run has passed them; by default none.

        Args:
            steps: Superseded steps, in the order of their commits.
        """
        return {}

    def __or__(self, other: "Retention") -> "Retention":
        if not isinstance(other, Retention):
            return NotImplemented
        return Union(*(part for side in (self, other) for part in (side.parts if isinstance(side, Union) else (side,))))


@dataclasses.dataclass(frozen=True)
class Latest(Retention):
    """Keep the `n` steps that were committed last.

    Attributes:
        n: How many steps to keep; an int, at least 1. Two are kept in any case.

    Example:
        >>> list(Latest(2).select_steps([StepInfo(step=10 * n, sequence=n) for n in (1, 2, 3)]))
        [2, 3]
    """

    n: int

    def __post_init__(self) -> None:
        require_count("Latest", "n", self.n)

    @override
    def select_steps(self, steps: Sequence[StepInfo]) -> dict[int, str]:
        return {step.sequence: f"one of the latest {self.n}" for step in steps[-self.n :]}


@dataclasses.dataclass(frozen=True)
class Best(Retention):
    """Keep the `n` steps with the best value of one recorded metric.

    NaN is worst. Superseded steps are ignored.

    Attributes:
        metric: Name of a metric passed to `step` or `save`, such as "val_loss".
        mode: "min" if smaller is better, "max" if larger is better.
        n: How many steps to keep; an int, at least 1.

    Example:
        >>> steps = [StepInfo(step=n, sequence=n, metrics={"loss": 1 / n}) for n in (1, 2, 3)]
        >>> Best("loss", mode="min").select_steps(steps)
        {3: 'one of the best 1 by loss'}
    """

    metric: str
    _: dataclasses.KW_ONLY
    mode: Literal["min", "max"]
    n: int = 1

    def __post_init__(self) -> None:
        require_name("Best", "metric", self.metric)
        require_mode("Best", self.mode)
        require_count("Best", "n", self.n)

    @override
    def select_steps(self, steps: Sequence[StepInfo]) -> dict[int, str]:
        best = rank_steps(steps, self.metric, self.mode)[: self.n]
        return {step.sequence: f"one of the best {self.n} by {self.metric}" for step in best}


@dataclasses.dataclass(frozen=True)
class EveryNSteps(Retention):
    """Keep every step that is a multiple of `n`.

    Attributes:
        n: An int, at least 1.

    Example:
        >>> EveryNSteps(100).select_steps([StepInfo(step=100, sequence=1), StepInfo(step=150, sequence=2)])
        {1: 'a multiple of 100'}
    """

    n: int

    def __post_init__(self) -> None:
        require_count("EveryNSteps", "n", self.n)

    @override
    def select_steps(self, steps: Sequence[StepInfo]) -> dict[int, str]:
        return {step.sequence: f"a multiple of {self.n}" for step in steps if step.step % self.n == 0}


@dataclasses.dataclass(frozen=True)
class EveryNSeconds(Retention):
    """Keep the first step, and then each that was saved at least `seconds` after the previous one kept.

    After a clock was set back, the next step is kept; otherwise none would be until the clock has caught up.

    Attributes:
        seconds: Time between two kept steps, in seconds; above 0.

    Example:
        >>> steps = [StepInfo(step=n, sequence=n, saved_at=1000.0 * n) for n in (1, 2, 3, 4)]
        >>> list(EveryNSeconds(2000).select_steps(steps))
        [1, 3]
    """

    seconds: float

    def __post_init__(self) -> None:
        require_positive("EveryNSeconds", "seconds", self.seconds)

    @override
    def select_steps(self, steps: Sequence[StepInfo]) -> dict[int, str]:
        kept: dict[int, str] = {}
        last_s = -math.inf
        for step in steps:
            if not 0 <= step.saved_at - last_s < self.seconds:
                kept[step.sequence] = f"{self.seconds:g} s after the previous one"
                last_s = step.saved_at
        return kept


@dataclasses.dataclass(frozen=True)
class Pinned(Retention):
    """Keep the given steps; steps pinned with `ckpt.pin` are kept in any case.

    Attributes:
        steps: Steps to keep, increasing; ints of at least 1.

    Example:
        >>> Pinned((1_000,)).select_steps([StepInfo(step=1_000, sequence=1)])
        {1: 'pinned by the spec'}
    """

    steps: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.steps, list):
            object.__setattr__(self, "steps", tuple(self.steps))
        require_steps("Pinned", self.steps)

    @override
    def select_steps(self, steps: Sequence[StepInfo]) -> dict[int, str]:
        return {step.sequence: "pinned by the spec" for step in steps if step.step in self.steps}

    @override
    def select_superseded(self, steps: Sequence[StepInfo]) -> dict[int, str]:
        return self.select_steps(steps)


@dataclasses.dataclass(frozen=True)
class All(Retention):
    """Keep every step.

    Example:
        >>> All().select_steps([StepInfo(step=10, sequence=1)])
        {1: 'everything is kept'}
    """

    @override
    def select_steps(self, steps: Sequence[StepInfo]) -> dict[int, str]:
        return {step.sequence: "everything is kept" for step in steps}

    @override
    def select_superseded(self, steps: Sequence[StepInfo]) -> dict[int, str]:
        return self.select_steps(steps)


@dataclasses.dataclass(frozen=True, init=False)
class Union(Retention):
    """Keep what at least one part does; written `a | b`."""

    parts: tuple[Retention, ...]

    def __init__(self, *parts: Retention) -> None:
        if not parts or not all(isinstance(part, Retention) for part in parts):
            raise SpecError(
                what=f"Union{parts!r} does not combine retention values.",
                why="an empty combination would keep nothing.",
                fix='Latest(3) | Best("val_loss", mode="min")',
            )
        object.__setattr__(self, "parts", parts)

    @override
    def select_steps(self, steps: Sequence[StepInfo]) -> dict[int, str]:
        return _merge_reasons(part.select_steps(steps) for part in self.parts)

    @override
    def select_superseded(self, steps: Sequence[StepInfo]) -> dict[int, str]:
        return _merge_reasons(part.select_superseded(steps) for part in self.parts)


def _merge_reasons(selections: Iterable[Mapping[int, str]]) -> dict[int, str]:
    kept: dict[int, str] = {}
    for selection in selections:
        for sequence, reason in selection.items():
            kept[sequence] = f"{kept[sequence]}, {reason}" if sequence in kept else reason
    return kept


def rank_steps(steps: Sequence[StepInfo], metric: str, mode: Literal["min", "max"]) -> list[StepInfo]:
    """Return the steps that recorded `metric`, best first, NaN last, the newer of two equals first.

    Args:
        steps: Committed steps; superseded ones are ignored.
        metric: Name of the metric.
        mode: "min" if smaller is better, "max" if larger is better.
    """
    sign = 1.0 if mode == "min" else -1.0

    def get_sort_key(step: StepInfo) -> tuple[bool, float, int]:
        value = step.metrics[metric]
        return (True, 0.0, -step.sequence) if math.isnan(value) else (False, sign * value, -step.sequence)

    return sorted((step for step in steps if metric in step.metrics and not step.superseded), key=get_sort_key)


def decide_retention(retention: Retention, steps: Sequence[StepInfo], *, newest_verified: int | None) -> list[Verdict]:
    """Decide which steps are kept and which may be deleted, with a reason for each.

    The retention value selects among the live steps, and separately among the superseded steps that the run has not
    passed; the newest two of each are always kept. The run has passed a superseded step when two later commits with
    its number or a greater one are kept. Pinned steps are always kept.

    Args:
        retention: The `keep` of the spec.
        steps: Committed steps of all branches, in any order.
        newest_verified: Sequence number of the newest verified step, which is never deleted; None if there is none.

    Returns:
        One verdict for each step, in the order of the commits.

    Example:
        >>> steps = [StepInfo(step=10 * n, sequence=n) for n in (1, 2, 3)]
        >>> [verdict.keep for verdict in decide_retention(Latest(1), steps, newest_verified=3)]
        [False, True, True]
    """
    ordered = sorted(steps, key=lambda step: step.sequence)
    live = [step for step in ordered if not step.superseded]
    superseded = [step for step in ordered if step.superseded]
    live_reasons = _select_or_newest(retention, live)
    kept_live = [step for step in live if step.sequence in live_reasons]
    # Marked as live, since `Best` ignores superseded steps.
    waiting = [dataclasses.replace(step, superseded=False) for step in superseded if not _is_passed(step, kept_live)]
    superseded_reasons = {
        sequence: f"superseded, not passed yet: {reason}"
        for sequence, reason in _select_or_newest(retention, waiting).items()
    } | retention.select_superseded(superseded)
    verdicts = []
    for step in ordered:
        # Two mappings, because a step that was copied by hand may share its sequence number with another one.
        reason = (superseded_reasons if step.superseded else live_reasons).get(step.sequence, "")
        reason = reason or ("pinned" if step.pinned else "")
        reason = reason or ("the newest verified step" if step.sequence == newest_verified else "")
        is_passed = step.superseded and _is_passed(step, kept_live)
        dropped = "superseded, and the run has passed it" if is_passed else "nothing in the spec keeps it"
        verdicts.append(Verdict(step, bool(reason), reason or dropped))
    return verdicts


def _select_or_newest(retention: Retention, steps: Sequence[StepInfo]) -> dict[int, str]:
    """Return what the retention selects, and always the newest steps."""
    newest = {step.sequence: f"at least {MIN_KEPT_STEPS} steps are kept" for step in steps[-MIN_KEPT_STEPS:]}
    return newest | retention.select_steps(steps)


def _is_passed(superseded: StepInfo, kept_live: Sequence[StepInfo]) -> bool:
    """Return whether the run has passed a superseded step; only later commits count, since a branch may be resumed."""
    later = [step for step in kept_live if step.step >= superseded.step and step.sequence > superseded.sequence]
    return len(later) >= MIN_KEPT_STEPS
