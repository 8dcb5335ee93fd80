# SPDX-License-Identifier: Apache-2.0
"""Where a run stands: its step and branch, how long it has trained, and the memory of its triggers.

Writes nothing. A background save may still fail, so the memory of the triggers from before it is kept until its
result is known.
"""

import time
from collections.abc import Mapping
from typing import Any

from ..errors import StepOrderError
from ..spec.triggers import Decision, Memory, StepContext, Trigger
from ..store import layout
from ..store.manifest import Lineage
from ..store.run_directory import RunDirectory
from ..tree.items import as_metric, require_metrics


class RunProgress:
    """Where a run stands.

    Args:
        trigger: When it saves.
        run: Its directory.

    Attributes:
        step: Completed updates: the step that was restored, passed or saved last; 0 before.
        lineage: The branch that its saves belong to.
        surgery: Operations that were applied in this run, as code.
    """

    def __init__(self, trigger: Trigger, run: RunDirectory) -> None:
        self.step = 0
        self.lineage: Lineage = ()
        self.surgery: tuple[str, ...] = ()
        self._trigger = trigger
        self._run = run
        self._origin: tuple[int, Lineage] | None = None
        self._memory: Memory = None
        self._memory_before_save: Memory = None
        self._previous_run_s = 0.0
        self._start_time = time.monotonic()

    @property
    def has_begun(self) -> bool:
        """Whether it is decided which step the run continues from, or that it starts from nothing."""
        return self._origin is not None

    def begin(self, step: int = 0, lineage: Lineage = (), memory: Memory = None, run_s: float = 0.0) -> None:
        """Continue from a restored step, or start from nothing.

        Args:
            step: The restored step.
            lineage: Its branch.
            memory: Memory of the triggers after it.
            run_s: Seconds of training up to it.
        """
        self._origin = step, lineage
        self.branch()
        self.step, self._memory = step, memory
        self._previous_run_s, self._start_time = run_s, time.monotonic()

    def branch(self) -> None:
        """Derive the branch again: another process may have continued the run since the restore."""
        if self._origin is not None:
            self.lineage = self._run.derive_lineage(*self._origin)

    def make_context(self, step: int, metrics: Mapping[str, Any], *, minimum: int = 1) -> StepContext:
        """Return a completed step as the triggers see it.

        Args:
            step: Completed updates; not less than those of the previous step.
            metrics: Values of this step; each is read when a trigger asks for it.
            minimum: The smallest valid step.

        Raises:
            StepOrderError: If the step is not such a count.
            LeafError: If the metrics are not a mapping by name.
        """
        require_metrics(metrics)
        if type(step) is not int or not minimum <= step <= layout.MAX_STEP:
            raise StepOrderError(
                what=f"step {step!r} is not a count of completed updates.",
                why="a step is an int of at most 18 digits, and the first completed one is 1.",
                fix="for step in ckpt.steps(total): ..., or ckpt.step(int(index) + 1, state) in your own loop.",
            )
        if step < self.step:
            raise StepOrderError(
                what=f"step {step!r} cannot come after step {self.step}.",
                why="a step counts completed updates, so it only grows.",
                fix="to go back, restore(state, step=...) an earlier step; that starts a branch.",
            )

        def get_metric(name: str) -> float | None:
            return as_metric(name, metrics[name]) if name in metrics else None

        return StepContext(
            step=step, run_s=self._previous_run_s + time.monotonic() - self._start_time, get_metric=get_metric
        )

    def decide(self, context: StepContext) -> Decision:
        """Return whether the triggers ask for a save; they remember that they were asked."""
        self._memory = self._trigger.observe(context, self._memory)
        return self._trigger.decide(context, self._memory)

    def compute_memory(self, context: StepContext) -> Memory:
        """Return the memory of the triggers once this step is saved."""
        return self._trigger.update_after_save(context, self._memory)

    def begin_save(self, context: StepContext) -> None:
        """Record that a save of this step has started."""
        self.step = context.step
        self._memory_before_save, self._memory = self._memory, self.compute_memory(context)

    def revert_save(self) -> None:
        """Record that the save failed."""
        self._memory = self._memory_before_save
