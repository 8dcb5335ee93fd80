# SPDX-License-Identifier: Apache-2.0
"""Trainers that are handed a spec and nothing else.

Whoever can say what its state is and make one update is a `Trainer`, and `train(trainer, spec)` is then the whole of
its checkpointing: restore, the loop, the saves, the end at SIGTERM. A trainer with a loop of its own needs another
handle: `peft_trainer` gives tunix's one, `CheckpointManager` has the methods of Orbax's manager, and `orbax_options`
is for those who build that themselves.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

from ..restore.report import RestoreReport
from ..restore.validation import Validate
from ..session.session import Session
from ..spec.spec import CheckpointSpec


@runtime_checkable
class Trainer(Protocol):
    """What `train` asks of a trainer."""

    @property
    def total_steps(self) -> int:
        """How many updates the whole training makes."""

    def get_state(self) -> Mapping[str, Any]:
        """Items by name: live objects or pytrees, data iterator included; the same names each time."""

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Take the restored items; live objects are filled in place before and are passed along."""

    def train_step(self) -> Mapping[str, Any] | None:
        """Make one update; returns the metrics of this step, which may be arrays."""


@dataclasses.dataclass(kw_only=True)
class FlaxLoop:
    """A plain loop as a `Trainer`.

    Attributes:
        state: Items by name.
        update: Makes one update: changes the live objects in `state`, or puts new values in their place; returns
            the metrics, or None.
        total_steps: How many updates the whole training makes.
    """

    state: dict[str, Any]
    update: Callable[[dict[str, Any]], Mapping[str, Any] | None]
    total_steps: int

    def get_state(self) -> Mapping[str, Any]:
        """The items."""
        return self.state

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Take the restored items."""
        self.state.update(state)

    def train_step(self) -> Mapping[str, Any] | None:
        """Make one update."""
        return self.update(self.state)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainReport:
    """What a training came to.

    Attributes:
        restored: What it went on from.
        last_step: Completed updates at its end; saved.
        preempted: Whether it was asked to stop before all updates were made.
    """

    restored: RestoreReport
    last_step: int
    preempted: bool


def train(trainer: Trainer, spec: CheckpointSpec, validate: Validate | None = None) -> TrainReport:
    """Train to the end, from the newest intact step if there is one.

    Args:
        trainer: The trainer.
        spec: When to save, what to keep, where.
        validate: As for `ct.open`.

    Raises:
        CheckpointError: If a step cannot be restored or saved.
    """
    with Session(spec, validate) as session:
        restored = session.restore(trainer.get_state())
        if restored.step is not None:
            trainer.set_state(restored.state)
        step = restored.step or 0
        for step in session.steps(trainer.total_steps):
            metrics = trainer.train_step()
            session.step(step, trainer.get_state(), metrics=metrics)
        return TrainReport(restored=restored, last_step=step, preempted=session.preempted)
