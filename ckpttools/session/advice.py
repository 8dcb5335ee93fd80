# SPDX-License-Identifier: Apache-2.0
"""Advice that is given when there is a reason for it, once: saving too often, keeping too little.

Pure: times come in, a sentence comes out.
"""

import dataclasses
import math
from collections.abc import Iterable

MAX_STALL_FRACTION = 0.05
"""Share of the training time above which saving is called expensive."""
TARGET_STALL_FRACTION = 0.01
"""Share that the advice aims at."""
_MIN_SAVES = 3
_MIN_STALL_S = 5.0
"""Stalls that sum up to less are nobody's business, whatever their share."""
_MAX_STEPS_WITHOUT_METRIC = 1000
"""After as many steps without it, a metric that the spec names is asked about."""
_MIN_STEPS = 10
"""A run of fewer steps may well end before its first evaluation."""


@dataclasses.dataclass
class StallMeter:
    """Adds up how long the training stood still for saves, from the first save on."""

    start_s: float | None = None
    first_step: int = 0
    save_count: int = 0
    stall_s: float = 0.0
    has_advised: bool = False

    def add(self, *, now_s: float, step: int, stall_s: float) -> str | None:
        """Take note of one save; returns advice if it is time for it.

        Args:
            now_s: The clock, in seconds, at the end of the stall.
            step: The saved step.
            stall_s: How long the training stood still.
        """
        if self.start_s is None:
            # The first save is not counted: it waits for nothing and maps its memory.
            self.start_s, self.first_step = now_s, step
            return None
        self.save_count, self.stall_s = self.save_count + 1, self.stall_s + stall_s
        elapsed_s = now_s - self.start_s
        enough = self.save_count >= _MIN_SAVES and self.stall_s >= _MIN_STALL_S
        if self.has_advised or not enough or self.stall_s <= MAX_STALL_FRACTION * elapsed_s:
            return None
        self.has_advised = True
        each_s = self.stall_s / self.save_count
        step_s = (elapsed_s - self.stall_s) / max(1, step - self.first_step)
        interval_s = each_s / TARGET_STALL_FRACTION
        steps = math.ceil(interval_s / step_s) if step_s > 0 else step
        return (
            f"saving took {self.stall_s / elapsed_s:.0%} of the training time ({each_s:.2g} s for each save). "
            f"EverySteps({steps}) or EverySeconds({interval_s:.0f}) would cost {TARGET_STALL_FRACTION:.0%}."
        )


@dataclasses.dataclass
class MetricWatch:
    """Notices that a metric which the spec names never comes: with a misspelt one a run would save nothing.

    Attributes:
        missing_names: Names that no step has had so far.
        other_names: Names that came instead.
        step_count: How many steps were seen.
    """

    missing_names: set[str]
    other_names: set[str] = dataclasses.field(default_factory=set)
    step_count: int = 0

    def add(self, names: Iterable[str], *, is_last: bool) -> str | None:
        """Take note of one step's metrics; returns advice, once, if it is time for it.

        Args:
            names: Names of the metrics of the step.
            is_last: Whether it is the run's last step.
        """
        if not self.missing_names:
            return None
        self.step_count += 1
        self.missing_names.difference_update(names)
        self.other_names.update(names)
        due = self.step_count == _MAX_STEPS_WITHOUT_METRIC or (
            is_last and _MIN_STEPS <= self.step_count < _MAX_STEPS_WITHOUT_METRIC
        )
        if not (due and self.missing_names):
            return None
        wanted = " and ".join(map(repr, sorted(self.missing_names)))
        example = f"ckpt.step(step, state, metrics={{{sorted(self.missing_names)[0]!r}: value}})"
        found = ", ".join(map(repr, sorted(self.other_names))) or "no metrics"
        return (
            f"the spec looks at {wanted}, which none of {self.step_count} steps had; they had {found}. If the name is "
            f"wrong, nothing is saved or kept for it: {example}."
        )


def advise_on_retention(*, rejected_count: int, intact_count: int) -> str | None:
    """What to say after damaged steps were passed over and few are left."""
    if rejected_count == 0 or intact_count > 1:
        return None
    return (
        f"{rejected_count} damaged step(s) were passed over and {intact_count} intact one is left; the next damage would end the "
        f"run. keep=Latest({rejected_count + intact_count + 2}) keeps a reserve."
    )
