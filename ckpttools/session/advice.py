# SPDX-License-Identifier: Apache-2.0
"""Advice and other warnings of a session: saving too often, keeping too few steps, a metric that never comes.

Everything but `warn` is pure: times go in, a sentence comes out.
"""

import dataclasses
import math
import pathlib
import warnings
from collections.abc import Iterable

from ..errors import CheckpointWarning

_PACKAGE = str(pathlib.Path(__file__).parents[1])

MAX_STALL_FRACTION = 0.05
"""Fraction of the training time above which saving is called expensive."""
TARGET_STALL_FRACTION = 0.01
"""Fraction that the advice aims at."""
_MIN_SAVES = 3
_MIN_STALL_S = 5.0
"""Stalls that sum up to less are not worth advice, whatever their fraction."""
_MAX_STEPS_WITHOUT_METRIC = 1000
"""After this many steps without a metric that the spec names, a warning asks about it."""
_MIN_STEPS = 10
"""A run of fewer steps may end before its first evaluation."""


@dataclasses.dataclass
class StallMeter:
    """Add up how long saves stall the training, from the first save on.

    Attributes:
        start_s: The clock at the first save, in seconds; None before it.
        first_step: The step of the first save.
        save_count: How many saves were counted; the first is not.
        stall_s: How long they stalled the training.
        has_advised: Whether the advice was given.
    """

    start_s: float | None = None
    first_step: int = 0
    save_count: int = 0
    stall_s: float = 0.0
    has_advised: bool = False

    def add(self, *, now_s: float, step: int, stall_s: float) -> str | None:
        """Count one save; return advice the first time that the stalls are too long.

        Args:
            now_s: The clock, in seconds, at the end of the stall.
            step: The saved step.
            stall_s: How long the training was stalled.
        """
        if self.start_s is None:
            # Not counted: the first save waits for no earlier one, and maps its memory.
            self.start_s, self.first_step = now_s, step
            return None
        self.save_count, self.stall_s = self.save_count + 1, self.stall_s + stall_s
        elapsed_s = now_s - self.start_s
        is_significant = self.save_count >= _MIN_SAVES and self.stall_s >= _MIN_STALL_S
        if self.has_advised or not is_significant or self.stall_s <= MAX_STALL_FRACTION * elapsed_s:
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
    """Notice that a metric which the spec names is never passed: with a misspelled one a run would save nothing.

    Attributes:
        missing_names: Names that no step has passed so far.
        other_names: Names that were passed.
        step_count: How many steps were counted.
    """

    missing_names: set[str]
    other_names: set[str] = dataclasses.field(default_factory=set)
    step_count: int = 0

    def add(self, names: Iterable[str], *, is_last: bool) -> str | None:
        """Count one step's metrics; return advice, once, if a name is still missing after many steps.

        Args:
            names: Names of the metrics of the step.
            is_last: Whether it is the run's last step.
        """
        if not self.missing_names:
            return None
        self.step_count += 1
        self.missing_names.difference_update(names)
        self.other_names.update(names)
        is_due = self.step_count == _MAX_STEPS_WITHOUT_METRIC or (
            is_last and _MIN_STEPS <= self.step_count < _MAX_STEPS_WITHOUT_METRIC
        )
        if not (is_due and self.missing_names):
            return None
        names_text = " and ".join(map(repr, sorted(self.missing_names)))
        example = f"ckpt.step(step, state, metrics={{{sorted(self.missing_names)[0]!r}: value}})"
        found = ", ".join(map(repr, sorted(self.other_names))) or "no metrics"
        return (
            f"the spec uses {names_text}, which none of {self.step_count} steps had; they had {found}. If the name is "
            f"wrong, nothing is saved or retained for it: {example}."
        )


def advise_on_retention(*, rejected_count: int, intact_count: int) -> str | None:
    """Return advice if damaged steps were passed over and at most one intact step is left."""
    if rejected_count == 0 or intact_count > 1:
        return None
    return (
        f"{rejected_count} damaged step(s) were passed over and {intact_count} intact step is left; the next damage "
        f"would end the run. keep=Latest({rejected_count + intact_count + 2}) keeps a reserve."
    )


def warn(text: str | None) -> None:
    """Warn the caller of the package, if there is something to say."""
    if text:
        warnings.warn(text, CheckpointWarning, stacklevel=2, skip_file_prefixes=(_PACKAGE,))
