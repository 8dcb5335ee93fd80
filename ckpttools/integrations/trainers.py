# SPDX-License-Identifier: Apache-2.0
"""Train with a spec: restore, the loop, the saves, and the exit at SIGTERM in one call.

Anything that can return its state and make one update is a `Trainer`, for `train(trainer, spec)`. A trainer that has
its own loop needs another way in: `peft_trainer` for tunix, `CheckpointManager` for code written for Orbax's manager,
and `orbax_options` for trainers that build Orbax's manager themselves.
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
    """The interface that `train` expects of a trainer.

    Example:
        >>> import ckpttools as ct
        >>> class Counter:
        ...     total_steps = 3
        ...     count = 0
        ...     def get_state(self):
        ...         return {"count": self.count}
        ...     def set_state(self, state):
        ...         self.count = state["count"]
        ...     def train_step(self):
        ...         self.count += 1
        >>> isinstance(Counter(), ct.Trainer)
        True
    """

    @property
    def total_steps(self) -> int:
        """Return how many updates the whole training makes."""

    def get_state(self) -> Mapping[str, Any]:
        """Return items by name: live objects or pytrees, data iterator included; the same names each time."""

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Accept the restored items; live objects are already filled in place."""

    def train_step(self) -> Mapping[str, Any] | None:
        """Make one update, and return the metrics of this step, which may be arrays."""


@dataclasses.dataclass(kw_only=True)
class FlaxLoop:
    """A plain loop as a `Trainer`.

    Attributes:
        state: Items by name.
        update: Makes one update by changing or replacing the items of `state`; returns the metrics, or None.
        total_steps: How many updates the whole training makes.

    Example:
        >>> import ckpttools as ct
        >>> def update(state):
        ...     state["model"]["w"] += 1
        >>> ct.FlaxLoop(state={"model": {"w": 0}}, update=update, total_steps=3).total_steps
        3
    """

    state: dict[str, Any]
    update: Callable[[dict[str, Any]], Mapping[str, Any] | None]
    total_steps: int

    def get_state(self) -> Mapping[str, Any]:
        """Return the items."""
        return self.state

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Replace the items by the restored ones."""
        self.state.update(state)

    def train_step(self) -> Mapping[str, Any] | None:
        """Make one update."""
        return self.update(self.state)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainReport:
    """The result of a training.

    Attributes:
        restored: The restore that it resumed from.
        last_step: Completed updates at its end; this step is saved.
        preempted: Whether a signal stopped it before all updates were made.

    Example:
        >>> import tempfile, ckpttools as ct
        >>> def update(state):
        ...     state["count"] += 1
        >>> spec = ct.CheckpointSpec(directory=tempfile.mkdtemp())
        >>> report = ct.train(ct.FlaxLoop(state={"count": 0}, update=update, total_steps=3), spec)
        >>> report.restored.step, report.last_step, report.preempted
        (None, 3, False)
    """

    restored: RestoreReport
    last_step: int
    preempted: bool


def train(trainer: Trainer, spec: CheckpointSpec, validate: Validate | None = None) -> TrainReport:
    """Train to the end, from the newest intact step if there is one.

    Args:
        trainer: The trainer, such as a `FlaxLoop`.
        spec: Where and when to save, and what to keep.
        validate: Returns outputs that are stored with each step and compared at a restore; see `ct.open`.

    Returns:
        The step reached, and what it resumed from.

    Raises:
        CheckpointError: If a step cannot be restored or saved.

    Example:
        >>> import tempfile, jax.numpy as jnp, ckpttools as ct
        >>> def update(state):
        ...     state["model"] = {"w": state["model"]["w"] + 1}
        >>> loop = ct.FlaxLoop(state={"model": {"w": jnp.zeros(2)}}, update=update, total_steps=3)
        >>> ct.train(loop, ct.CheckpointSpec(directory=tempfile.mkdtemp())).last_step
        3
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
