# SPDX-License-Identifier: Apache-2.0
"""Advice that is given when there is a reason for it, once: saving too often, keeping too little.

Pure: times come in, a sentence comes out.
"""

import dataclasses
import math
from collections.abc import Iterable

TOO_MUCH = 0.05
"""Share of the training time above which saving is called expensive."""
GOAL = 0.01
"""Share that the advice aims at."""
_FEWEST_SAVES = 3
_SHORTEST_S = 5.0
"""Stalls that sum up to less are nobody's business, whatever their share."""
_UNSEEN_STEPS = 1000
"""After as many steps without it, a metric that the spec names is asked about."""
_FEWEST_STEPS = 10
"""A run of fewer steps may well end before its first evaluation."""


@dataclasses.dataclass
class StallMeter:
    """Adds up how long the training stood still for saves, from the first save on."""

    began_s: float | None = None
    first_step: int = 0
    saves: int = 0
    stall_s: float = 0.0
    advised: bool = False

    def add(self, *, now_s: float, step: int, stall_s: float) -> str | None:
        """Take note of one save; returns advice if it is time for it.

        Args:
            now_s: The clock, in seconds, at the end of the stall.
            step: The saved step.
            stall_s: How long the training stood still.
        """
        if self.began_s is None:
            # The first save is not counted: it waits for nothing and maps its memory.
            self.began_s, self.first_step = now_s, step
            return None
        self.saves, self.stall_s = self.saves + 1, self.stall_s + stall_s
        elapsed_s = now_s - self.began_s
        enough = self.saves >= _FEWEST_SAVES and self.stall_s >= _SHORTEST_S
        if self.advised or not enough or self.stall_s <= TOO_MUCH * elapsed_s:
            return None
        self.advised = True
        each_s = self.stall_s / self.saves
        step_s = (elapsed_s - self.stall_s) / max(1, step - self.first_step)
        interval_s = each_s / GOAL
        steps = math.ceil(interval_s / step_s) if step_s > 0 else step
        return (
            f"saving took {self.stall_s / elapsed_s:.0%} of the training time ({each_s:.2g} s for each save). "
            f"EverySteps({steps}) or EverySeconds({interval_s:.0f}) would cost {GOAL:.0%}."
        )


@dataclasses.dataclass
class MetricWatch:
    """Notices that a metric which the spec names never comes: with a misspelt one a run would save nothing.

    Attributes:
        missing: Names that no step has had so far.
        others: Names that came instead.
        steps: How many steps were seen.
    """

    missing: set[str]
    others: set[str] = dataclasses.field(default_factory=set)
    steps: int = 0

    def add(self, names: Iterable[str], *, last: bool) -> str | None:
        """Take note of one step's metrics; returns advice, once, if it is time for it.

        Args:
            names: Names of the metrics of the step.
            last: Whether it is the run's last step.
        """
        if not self.missing:
            return None
        self.steps += 1
        self.missing.difference_update(names)
        self.others.update(names)
        due = self.steps == _UNSEEN_STEPS or (last and _FEWEST_STEPS <= self.steps < _UNSEEN_STEPS)
        if not (due and self.missing):
            return None
        wanted = " and ".join(map(repr, sorted(self.missing)))
        example = f"ckpt.step(step, state, metrics={{{sorted(self.missing)[0]!r}: value}})"
        found = ", ".join(map(repr, sorted(self.others))) or "no metrics"
        return (
            f"the spec looks at {wanted}, which none of {self.steps} steps had; they had {found}. If the name is "
            f"wrong, nothing is saved or kept for it: {example}."
        )


def sparse_retention(*, rejected: int, intact: int) -> str | None:
    """What to say after damaged steps were passed over and few are left."""
    if rejected == 0 or intact > 1:
        return None
    return (
        f"{rejected} damaged step(s) were passed over and {intact} intact one is left; the next damage would end the "
        f"run. keep=Latest({rejected + intact + 2}) keeps a reserve."
    )
