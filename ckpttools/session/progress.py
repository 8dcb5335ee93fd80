# SPDX-License-Identifier: Apache-2.0
"""Where a run stands: its step and branch, how long it has trained, and what its triggers remember.

Nothing is written here. A save in the background may still fail, so what the triggers remembered before it is kept
until its result is known.
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
        run: Its folder.

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
        """Whether it is known where the run goes on, be it from nothing."""
        return self._origin is not None

    def begin(self, step: int = 0, lineage: Lineage = (), memory: Memory = None, run_s: float = 0.0) -> None:
        """Go on from a restored step, or from nothing."""
        self._origin = step, lineage
        self.branch()
        self.step, self._memory = step, memory
        self._previous_run_s, self._start_time = run_s, time.monotonic()

    def branch(self) -> None:
        """Find the branch anew: another process may have gone on with the run since the restore."""
        if self._origin is not None:
            self.lineage = self._run.derive_lineage(*self._origin)

    def make_context(self, step: int, metrics: Mapping[str, Any], *, minimum: int = 1) -> StepContext:
        """A completed step as the triggers see it.

        Args:
            step: Completed updates, none of them undone.
            metrics: Values of this step; each is read when a trigger asks for it.
            minimum: The smallest step.

        Raises:
            StepOrderError: If the step is no such count.
            LeafError: If the metrics are no mapping by name.
        """
        require_metrics(metrics)
        if type(step) is not int or not minimum <= step <= layout.MAX_STEP:
            raise StepOrderError(
                what=f"step {step!r} is no count of completed updates.",
                why="a step is an int of at most 18 digits, and the first one that is complete is 1.",
                fix="for step in ckpt.steps(total): ..., or ckpt.step(int(index) + 1, state) in a loop of your own.",
            )
        if step < self.step:
            raise StepOrderError(
                what=f"step {step!r} cannot come after step {self.step}.",
                why="a step counts completed updates, so it only grows.",
                fix="to go back, restore(state, step=...) an earlier step; that begins a branch.",
            )

        def get_metric(name: str) -> float | None:
            return as_metric(name, metrics[name]) if name in metrics else None

        return StepContext(
            step=step, run_s=self._previous_run_s + time.monotonic() - self._start_time, get_metric=get_metric
        )

    def decide(self, context: StepContext) -> Decision:
        """Whether the triggers want a save, which they remember having been asked."""
        self._memory = self._trigger.observe(context, self._memory)
        return self._trigger.decide(context, self._memory)

    def compute_memory(self, context: StepContext) -> Memory:
        """What the triggers remember once this moment is saved."""
        return self._trigger.update_after_save(context, self._memory)

    def begin_save(self, context: StepContext) -> None:
        """A save of this moment has begun."""
        self.step = context.step
        self._memory_before_save, self._memory = self._memory, self.compute_memory(context)

    def revert_save(self) -> None:
        """The triggers were told of a save that did not happen."""
        self._memory = self._memory_before_save
