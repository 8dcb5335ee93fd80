# SPDX-License-Identifier: Apache-2.0
"""The position of a run: its step and branch, how long it has trained, and the memory of its triggers.

Writes nothing. A background save may still fail, so the triggers' memory from before the save is kept until its result
is known. The position changes in one assignment, so an interrupt leaves either the old or the new one.
"""

import dataclasses
import time
from collections.abc import Mapping, Set
from typing import Any

import jax

from ..errors import StepOrderError
from ..spec.triggers import Decision, Memory, StepContext, Trigger
from ..store import layout
from ..store.manifest import Lineage
from ..store.run_directory import RunDirectory
from ..tree.items import as_metric, require_metrics


def read_metric(name: str, value: Any) -> float:
    """Return a metric as a float; if it is an array, this waits for the device."""
    # The caller requested the value, so a transfer guard must not reject the transfer.
    with jax.transfer_guard("allow"):
        return as_metric(name, value)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Position:
    """The position of a run.

    Attributes:
        origin: The step and lineage that it continues from.
        step: Completed updates: the step that was restored, passed or saved last; 0 before any.
        saved_step: The newest step that was restored, or saved by this session; 0 before any.
        lineage: The lineage of its next save.
        memory: Memory of the triggers.
        surgery: Operations that were applied in this run, as code.
        next_sequence: The number of the run's next commit when it was decided to continue from the origin.
        superseded_steps: The steps that its next save may supersede: not those that were passed over because they were
            damaged.
        previous_run_s: Seconds of training up to the origin.
        start_time: `time.monotonic()` at the origin.
    """

    origin: tuple[int, Lineage]
    step: int
    saved_step: int
    lineage: Lineage
    memory: Memory
    surgery: tuple[str, ...]
    next_sequence: int
    superseded_steps: frozenset[int]
    previous_run_s: float
    start_time: float


class RunProgress:
    """The position of a run, and the rules by which it changes.

    Args:
        trigger: When it saves.
        run: Its directory.
    """

    def __init__(self, trigger: Trigger, run: RunDirectory) -> None:
        self._trigger = trigger
        self._run = run
        self._position: Position | None = None
        self._before_save: tuple[object, Memory] = (None, None)

    @property
    def has_begun(self) -> bool:
        """Whether the run continues from a restored step or has been started from scratch."""
        return self._position is not None

    @property
    def step(self) -> int:
        """Completed updates: the step that was restored, passed or saved last; 0 before any."""
        return 0 if self._position is None else self._position.step

    @property
    def origin(self) -> tuple[int, Lineage] | None:
        """The step and branch that the run continues from; another object after each restore."""
        return None if self._position is None else self._position.origin

    @property
    def next_sequence(self) -> int | None:
        """The number of the run's next commit when it was decided to continue from the origin."""
        return None if self._position is None else self._position.next_sequence

    @property
    def saved_step(self) -> int:
        """The newest step that was restored, or saved by this session; 0 before any."""
        return 0 if self._position is None else self._position.saved_step

    @property
    def lineage(self) -> Lineage:
        """The lineage of the run's next save."""
        return () if self._position is None else self._position.lineage

    @property
    def surgery(self) -> tuple[str, ...]:
        """Operations that were applied in this run, as code."""
        return () if self._position is None else self._position.surgery

    def begin(
        self,
        step: int = 0,
        lineage: Lineage = (),
        memory: Memory = None,
        run_s: float = 0.0,
        surgery: tuple[str, ...] = (),
        next_sequence: int | None = None,
        passed_over: Set[int] = frozenset(),
    ) -> None:
        """Continue from a restored step, or start from scratch.

        Args:
            step: The restored step.
            lineage: Its lineage.
            memory: Memory of the triggers after it.
            run_s: Seconds of training up to it.
            surgery: Operations that were applied in this run, as code.
            next_sequence: The number of the run's next commit when its steps were listed; None for now.
            passed_over: Steps that were not restored because they were damaged.
        """
        if next_sequence is None:
            next_sequence = self._run.refresh_steps().next_sequence
        self._position = Position(
            origin=(step, lineage),
            step=step,
            saved_step=step,
            lineage=self._run.derive_lineage(step, lineage),
            memory=memory,
            surgery=surgery,
            next_sequence=next_sequence,
            superseded_steps=frozenset(self._run.list_superseded_by(step, lineage)) - passed_over,
            previous_run_s=run_s,
            start_time=time.monotonic(),
        )

    def list_unforeseen_steps(self) -> tuple[int, ...]:
        """Return the steps that the next save would supersede although a restore now would try them first.

        They were damaged when the run was restored, and have been repaired, fetched or saved again since.
        """
        if self._position is None:
            return ()
        superseded = self._run.list_superseded_by(*self._position.origin)
        return tuple(step for step in superseded if step not in self._position.superseded_steps)

    def branch(self) -> None:
        """Derive the lineage again: another process may have continued the run since the restore."""
        if self._position is not None:
            self._change(lineage=self._run.derive_lineage(*self._position.origin))

    def suspend(self) -> Position | None:
        """Clear the position while the state is replaced, and return it; until `begin`, no step can be saved."""
        position, self._position = self._position, None
        return position

    def reinstate(self, position: Position | None) -> None:
        """Set the position that `suspend` returned, because the state was not replaced."""
        self._position = position

    def pass_step(self, step: int) -> None:
        """Record a completed step that is not saved."""
        self._change(step=step)

    def record_saved(self, step: int) -> None:
        """Record that a step is on disk."""
        self._change(saved_step=max(step, self.saved_step))

    def _change(self, **values: Any) -> None:
        if self._position is not None:
            self._position = dataclasses.replace(self._position, **values)

    def make_context(self, step: int, metrics: Mapping[str, Any], *, minimum: int = 1) -> StepContext:
        """Return a completed step as the triggers see it.

        Args:
            step: Completed updates; at least those of the previous step.
            metrics: Values of this step; each is read when a trigger requests it.
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
                why=f"a step counts completed updates, so it only grows; the run is {self._run.directory}.",
                fix=f"to go back, ckpt.restore(state, step={max(step - 1, 0)}); that begins a branch.",
            )

        def get_metric(name: str) -> float | None:
            return read_metric(name, metrics[name]) if name in metrics else None

        previous_s, start = (0.0, time.monotonic())
        if self._position is not None:
            previous_s, start = self._position.previous_run_s, self._position.start_time
        return StepContext(step=step, run_s=previous_s + time.monotonic() - start, get_metric=get_metric)

    def decide(self, context: StepContext) -> Decision:
        """Return whether the triggers request a save, and update their memory."""
        memory = self._trigger.observe(context, self._memory)
        self._change(memory=memory)
        return self._trigger.decide(context, memory)

    def compute_memory(self, context: StepContext) -> Memory:
        """Return the memory of the triggers once this step is saved."""
        return self._trigger.update_after_save(context, self._memory)

    def begin_save(self, context: StepContext, save: object) -> None:
        """Record that a save of this step is about to start.

        Args:
            context: The step.
            save: Identifies the save in `revert_save`.
        """
        self._before_save = save, self._memory
        self._change(step=context.step, memory=self.compute_memory(context))

    def revert_save(self, save: object) -> None:
        """Record that a save failed."""
        begun, memory = self._before_save
        if begun is save:
            self._change(memory=memory)

    @property
    def _memory(self) -> Memory:
        return None if self._position is None else self._position.memory
