# SPDX-License-Identifier: Apache-2.0
"""What to keep: frozen values that choose from a list of committed steps.

Pure: no disk, no clock. Each value names the steps it wants to keep and why; `a | b` keeps what either wants.
`decide` adds what no spec can take away: the newest verified step, at least two committed steps, and pins.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Literal, override

from ..errors import SpecError
from .checks import require_count, require_mode, require_name, require_positive, require_steps

MIN_KEPT_STEPS = 2
"""Committed steps that are always kept: with one, its damage would be the end of the run."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepInfo:
    """What retention may know of a committed step.

    Attributes:
        step: Completed updates.
        sequence: Order of the commits, from 1; after a rollback it does not follow `step`.
        saved_at: Seconds since the epoch.
        metrics: Metrics recorded with the step.
        pinned: Whether `pin` was called on it.
        superseded: Whether it belongs to a branch that was given up by resuming from an earlier step.
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
    """Base of all retention values: `a | b` keeps what either keeps."""

    def select_steps(self, steps: Sequence[StepInfo]) -> dict[int, str]:
        """Sequence numbers of the steps to keep, with the reason; `steps` are in the order of their commits."""
        raise NotImplementedError

    def __or__(self, other: "Retention") -> "Retention":
        if not isinstance(other, Retention):
            return NotImplemented
        return Union(*(part for side in (self, other) for part in (side.parts if isinstance(side, Union) else (side,))))


@dataclasses.dataclass(frozen=True)
class Latest(Retention):
    """Keep the `n` steps that were committed last."""

    n: int

    def __post_init__(self) -> None:
        require_count("Latest", "n", self.n)

    @override
    def select_steps(self, steps: Sequence[StepInfo]) -> dict[int, str]:
        return {step.sequence: f"one of the latest {self.n}" for step in steps[-self.n :]}


@dataclasses.dataclass(frozen=True)
class Best(Retention):
    """Keep the `n` steps with the best value of one recorded metric.

    NaN counts as worst. Superseded steps do not compete.

    Attributes:
        metric: Name of a metric passed to `step` or `save`, such as "val_loss".
        mode: "min" if smaller is better, "max" if larger is better.
        n: How many steps to keep; an int, at least 1.
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
    """Keep every step that `n` divides."""

    n: int

    def __post_init__(self) -> None:
        require_count("EveryNSteps", "n", self.n)

    @override
    def select_steps(self, steps: Sequence[StepInfo]) -> dict[int, str]:
        return {step.sequence: f"a multiple of {self.n}" for step in steps if step.step % self.n == 0}


@dataclasses.dataclass(frozen=True)
class EveryNSeconds(Retention):
    """Keep the first step, and then each that was saved at least `seconds` after the one kept before it.

    A clock that was set back begins anew: else nothing would be kept until it has caught up.
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
                kept[step.sequence] = f"{self.seconds:g} s after the one before"
                last_s = step.saved_at
        return kept


@dataclasses.dataclass(frozen=True)
class Pinned(Retention):
    """Keep the given steps. Steps pinned with `ckpt.pin` are kept in any case."""

    steps: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.steps, list):
            object.__setattr__(self, "steps", tuple(self.steps))
        require_steps("Pinned", self.steps)

    @override
    def select_steps(self, steps: Sequence[StepInfo]) -> dict[int, str]:
        return {step.sequence: "pinned by the spec" for step in steps if step.step in self.steps}


@dataclasses.dataclass(frozen=True)
class All(Retention):
    """Keep everything."""

    @override
    def select_steps(self, steps: Sequence[StepInfo]) -> dict[int, str]:
        return {step.sequence: "everything is kept" for step in steps}


@dataclasses.dataclass(frozen=True, init=False)
class Union(Retention):
    """Keep what at least one part keeps; written `a | b`."""

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
        kept: dict[int, str] = {}
        for part in self.parts:
            for sequence, reason in part.select_steps(steps).items():
                kept[sequence] = f"{kept[sequence]}, {reason}" if sequence in kept else reason
        return kept


def rank_steps(steps: Sequence[StepInfo], metric: str, mode: Literal["min", "max"]) -> list[StepInfo]:
    """Live steps that recorded `metric`, best first, NaN last, the newer of two equals first."""
    sign = 1.0 if mode == "min" else -1.0

    def get_sort_key(step: StepInfo) -> tuple[bool, float, int]:
        value = step.metrics[metric]
        return (True, 0.0, -step.sequence) if math.isnan(value) else (False, sign * value, -step.sequence)

    return sorted((step for step in steps if metric in step.metrics and not step.superseded), key=get_sort_key)


def decide_retention(retention: Retention, steps: Sequence[StepInfo], *, newest_verified: int | None) -> list[Verdict]:
    """What is kept and what may be deleted, with a reason for each.

    Args:
        retention: The spec's wish.
        steps: Committed steps, in any order.
        newest_verified: Sequence number of the newest step whose manifest verified; never deleted.

    Returns:
        One verdict a step, in the order of the commits.
    """
    ordered = sorted(steps, key=lambda step: step.sequence)
    reasons = retention.select_steps(ordered)
    for step in ordered:
        if step.pinned:
            reasons.setdefault(step.sequence, "pinned")
    if newest_verified is not None:
        reasons.setdefault(newest_verified, "the newest verified step")
    for step in ordered[-MIN_KEPT_STEPS:]:
        reasons.setdefault(step.sequence, f"at least {MIN_KEPT_STEPS} steps are kept")
    return [
        Verdict(step, step.sequence in reasons, reasons.get(step.sequence, "nothing in the spec keeps it"))
        for step in ordered
    ]
