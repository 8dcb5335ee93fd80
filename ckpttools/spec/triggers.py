# SPDX-License-Identifier: Apache-2.0
"""When to save: frozen values that decide from a step, a clock and metrics.

Pure. A trigger holds no state. What it must remember (the last time, the best value, a history of losses) is a JSON
value that the caller passes in and stores in each step's manifest, so that a resumed run decides as an uninterrupted
one.

A trigger has three methods: `observe` sees every step, `decide` says whether to save at this step, and
`update_after_save` records that a save happened, for whatever reason. Improvement is therefore measured against what
was *saved*: with `EverySteps(500) & OnImprovement("val_loss", mode="min")`, a better value at step 450, which is not
saved, does not keep a slightly worse one from being saved at step 500.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal, override

from ..errors import SpecError
from .checks import require_count, require_mode, require_name, require_positive, require_steps

type Memory = Any
"""What a trigger remembers: a JSON value; None at the start of a run."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepContext:
    """What a trigger decides from.

    Attributes:
        step: Completed updates, from 1.
        run_s: Seconds that the run has been training, without the pauses between processes.
        get_metric: Returns a metric of this step by name; None if the step has no such metric.
    """

    step: int
    run_s: float = 0.0
    get_metric: Callable[[str], float | None] = lambda _name: None


@dataclasses.dataclass(frozen=True)
class Decision:
    """Whether to save, and the reason as a phrase such as "every 500 steps"."""

    save: bool
    reason: str


class Trigger:
    """Base of all triggers: combine them with `|` (either) and `&` (both at the same step).

    A subclass overrides `decide`, and the other methods if it needs a memory.

    Example:
        >>> trigger = EverySteps(1000) | (EverySteps(100) & OnImprovement("val_loss", mode="min"))
        >>> trigger.get_metric_names()
        frozenset({'val_loss'})
    """

    def observe(self, context: StepContext, memory: Memory) -> Memory:
        """Return the memory after a step, whether or not it is saved."""
        return memory

    def decide(self, context: StepContext, memory: Memory) -> Decision:
        """Return whether to save at this step."""
        raise NotImplementedError

    def update_after_save(self, context: StepContext, memory: Memory) -> Memory:
        """Return the memory after a save at this step."""
        return memory

    def is_valid_memory(self, memory: Memory) -> bool:
        """Return whether a memory that was read from disk has the form that this trigger writes."""
        return True

    def get_metric_names(self) -> frozenset[str]:
        """Return the names of the metrics that the trigger reads."""
        return frozenset()

    def __or__(self, other: "Trigger") -> "Trigger":
        return (
            AnyOf(*_get_parts(AnyOf, self), *_get_parts(AnyOf, other)) if isinstance(other, Trigger) else NotImplemented
        )

    def __and__(self, other: "Trigger") -> "Trigger":
        return (
            AllOf(*_get_parts(AllOf, self), *_get_parts(AllOf, other)) if isinstance(other, Trigger) else NotImplemented
        )


@dataclasses.dataclass(frozen=True)
class EverySteps(Trigger):
    """Save at every step that is a multiple of `n`.

    Attributes:
        n: Steps between two saves; an int, at least 1.

    Example:
        >>> EverySteps(500).decide(StepContext(step=1500), None).save
        True
    """

    n: int

    def __post_init__(self) -> None:
        require_count("EverySteps", "n", self.n)

    @override
    def decide(self, context: StepContext, memory: Memory) -> Decision:
        return Decision(context.step % self.n == 0, f"every {self.n} steps")


@dataclasses.dataclass(frozen=True)
class EverySeconds(Trigger):
    """Save when `seconds` of training have passed since the last save, whatever caused that save.

    Attributes:
        seconds: Training time between two saves, in seconds; above 0.

    Example:
        >>> EverySeconds(900).decide(StepContext(step=10, run_s=60.0), None).save
        False
    """

    seconds: float

    def __post_init__(self) -> None:
        require_positive("EverySeconds", "seconds", self.seconds)

    @override
    def is_valid_memory(self, memory: Memory) -> bool:
        return isinstance(memory, int | float)

    @override
    def decide(self, context: StepContext, memory: Memory) -> Decision:
        return Decision(context.run_s - (memory or 0.0) >= self.seconds, f"every {self.seconds:g} s")

    @override
    def update_after_save(self, context: StepContext, memory: Memory) -> Memory:
        return context.run_s


@dataclasses.dataclass(frozen=True)
class AtSteps(Trigger):
    """Save at the given steps.

    Attributes:
        steps: Steps to save, increasing; ints of at least 1.

    Example:
        >>> AtSteps((1_000, 10_000)).decide(StepContext(step=1_000), None).save
        True
    """

    steps: tuple[int, ...]

    def __post_init__(self) -> None:
        if isinstance(self.steps, list):
            object.__setattr__(self, "steps", tuple(self.steps))
        require_steps("AtSteps", self.steps, minimum=1)

    @override
    def decide(self, context: StepContext, memory: Memory) -> Decision:
        return Decision(context.step in self.steps, "one of the given steps")


@dataclasses.dataclass(frozen=True)
class OnImprovement(Trigger):
    """Save when a metric is better than at any saved step.

    Attributes:
        metric: Name of a metric passed to `step`, such as "val_loss"; steps without it are not saved.
        mode: "min" if smaller is better, "max" if larger is better.
        min_delta: By how much it must be better, in the unit of the metric.

    Example:
        >>> loss = lambda name: 0.2
        >>> OnImprovement("val_loss", mode="min").decide(StepContext(step=7, get_metric=loss), 0.3).save
        True
    """

    metric: str
    _: dataclasses.KW_ONLY
    mode: Literal["min", "max"]
    min_delta: float = 0.0

    def __post_init__(self) -> None:
        require_name("OnImprovement", "metric", self.metric)
        require_mode("OnImprovement", self.mode)
        if self.min_delta != 0.0:
            require_positive("OnImprovement", "min_delta", self.min_delta)

    @override
    def get_metric_names(self) -> frozenset[str]:
        return frozenset({self.metric})

    @override
    def is_valid_memory(self, memory: Memory) -> bool:
        return isinstance(memory, int | float)

    @override
    def decide(self, context: StepContext, memory: Memory) -> Decision:
        value = context.get_metric(self.metric)
        return Decision(value is not None and self._is_better(value, memory), f"{self.metric} improved")

    @override
    def update_after_save(self, context: StepContext, memory: Memory) -> Memory:
        value = context.get_metric(self.metric)
        if value is None or math.isnan(value):
            return memory
        return value if memory is None else (min if self.mode == "min" else max)(value, memory)

    def _is_better(self, value: float, best: float | None) -> bool:
        # NaN is never an improvement: a diverged run must not replace its own best.
        if math.isnan(value):
            return False
        if best is None:
            return True
        gain = best - value if self.mode == "min" else value - best
        return gain > self.min_delta if self.min_delta == 0 else gain >= self.min_delta


@dataclasses.dataclass(frozen=True)
class Adaptive(Trigger):
    """Save often while a loss is unstable and rarely while it is stable.

    After each `window` values of the loss, the interval between saves is halved if their relative standard deviation
    is above `unstable` or one of them is not finite, and doubled otherwise. It changes once per window, so that one
    bad batch does not drive it to its limit.

    Attributes:
        metric: Name of the loss, passed to `step`; the more often it is passed, the faster the interval follows.
        base_steps: Interval at the start, in steps.
        min_steps: Smallest interval, in steps.
        max_steps: Largest interval, in steps.
        window: Number of values per adjustment; an int, at least 2.
        unstable: Relative standard deviation above which the loss is unstable.

    Example:
        >>> Adaptive("loss", min_steps=100).decide(StepContext(step=1000), None).reason
        'every 1000 steps at present, following loss'
    """

    metric: str
    _: dataclasses.KW_ONLY
    base_steps: int = 1000
    min_steps: int = 500
    max_steps: int = 5000
    window: int = 10
    unstable: float = 0.1

    def __post_init__(self) -> None:
        require_name("Adaptive", "metric", self.metric)
        for field in ("base_steps", "min_steps", "max_steps"):
            require_count("Adaptive", field, getattr(self, field))
        require_count("Adaptive", "window", self.window, minimum=2)
        require_positive("Adaptive", "unstable", self.unstable)
        if not self.min_steps <= self.base_steps <= self.max_steps:
            raise SpecError(
                what=f"Adaptive has min_steps={self.min_steps}, base_steps={self.base_steps}, "
                f"max_steps={self.max_steps}.",
                why="the interval starts at base_steps and stays between min_steps and max_steps.",
                fix="choose min_steps <= base_steps <= max_steps.",
            )

    @override
    def get_metric_names(self) -> frozenset[str]:
        return frozenset({self.metric})

    @override
    def is_valid_memory(self, memory: Memory) -> bool:
        if not isinstance(memory, dict) or memory.keys() != {"history", "interval", "last"}:
            return False
        history = memory["history"]
        counts = all(type(memory[name]) is int for name in ("interval", "last"))
        return counts and isinstance(history, list) and all(isinstance(value, int | float) for value in history)

    @override
    def observe(self, context: StepContext, memory: Memory) -> Memory:
        value = context.get_metric(self.metric)
        if value is None:
            return memory
        memory = self._get_memory(memory)
        history = [*memory["history"], value]
        interval = memory["interval"]
        if len(history) >= self.window:
            factor = 0.5 if self._is_unstable(history) else 2
            interval = min(self.max_steps, max(self.min_steps, int(interval * factor)))
            history = []
        return {**memory, "history": history, "interval": interval}

    @override
    def decide(self, context: StepContext, memory: Memory) -> Decision:
        memory = self._get_memory(memory)
        due = context.step - memory["last"] >= memory["interval"]
        return Decision(due, f"every {memory['interval']} steps at present, following {self.metric}")

    @override
    def update_after_save(self, context: StepContext, memory: Memory) -> Memory:
        return {**self._get_memory(memory), "last": context.step}

    def _get_memory(self, memory: Memory) -> dict[str, Any]:
        return memory or {"history": [], "interval": self.base_steps, "last": 0}

    def _is_unstable(self, history: list[float]) -> bool:
        if not all(map(math.isfinite, history)):
            return True
        mean = math.fsum(history) / len(history)
        standard_deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in history) / len(history))
        return standard_deviation > self.unstable * abs(mean)


class _Combination(Trigger):
    """Base of `AnyOf` and `AllOf`: the memory is a list of the parts' memories, in order."""

    parts: tuple[Trigger, ...]

    def observe(self, context: StepContext, memory: Memory) -> Memory:
        return [part.observe(context, part_memory) for part, part_memory in self._pair_with_memory(memory)]

    def update_after_save(self, context: StepContext, memory: Memory) -> Memory:
        return [part.update_after_save(context, part_memory) for part, part_memory in self._pair_with_memory(memory)]

    def get_metric_names(self) -> frozenset[str]:
        return frozenset().union(*(part.get_metric_names() for part in self.parts))

    def _decide_parts(self, context: StepContext, memory: Memory) -> list[Decision]:
        return [part.decide(context, part_memory) for part, part_memory in self._pair_with_memory(memory)]

    def _pair_with_memory(self, memory: Memory) -> list[tuple[Trigger, Memory]]:
        return list(zip(self.parts, memory or [None] * len(self.parts), strict=True))


@dataclasses.dataclass(frozen=True, init=False)
class AnyOf(_Combination):
    """Save when at least one part does; written `a | b`."""

    parts: tuple[Trigger, ...]

    def __init__(self, *parts: Trigger) -> None:
        object.__setattr__(self, "parts", _require_parts("AnyOf", "|", parts))

    @override
    def decide(self, context: StepContext, memory: Memory) -> Decision:
        decisions = self._decide_parts(context, memory)
        reasons = [decision.reason for decision in decisions if decision.save]
        return Decision(bool(reasons), " and ".join(reasons or (decision.reason for decision in decisions)))


@dataclasses.dataclass(frozen=True, init=False)
class AllOf(_Combination):
    """Save when all parts do at the same step; written `a & b`."""

    parts: tuple[Trigger, ...]

    def __init__(self, *parts: Trigger) -> None:
        object.__setattr__(self, "parts", _require_parts("AllOf", "&", parts))

    @override
    def decide(self, context: StepContext, memory: Memory) -> Decision:
        decisions = self._decide_parts(context, memory)
        return Decision(all(d.save for d in decisions), " with ".join(d.reason for d in decisions))


def _get_parts(kind: type[AnyOf] | type[AllOf], trigger: Trigger) -> tuple[Trigger, ...]:
    """Return the parts of `trigger` if it is of `kind`, so that `a | b | c` is one flat value."""
    return trigger.parts if isinstance(trigger, kind) else (trigger,)


def _require_parts(owner: str, operator: str, parts: tuple[Trigger, ...]) -> tuple[Trigger, ...]:
    if not parts or not all(isinstance(part, Trigger) for part in parts):
        raise SpecError(
            what=f"{owner}{parts!r} does not combine triggers.",
            why="its parts must be triggers, and an empty combination would save never or always.",
            fix=f"EverySteps(500) {operator} EverySeconds(900)",
        )
    return parts
