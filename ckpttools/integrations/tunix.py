# SPDX-License-Identifier: Apache-2.0
"""tunix's `PeftTrainer` on a spec: its checkpoint manager is replaced, its code is not touched.

Nothing here imports tunix, and no module of it is patched. Facts that shaped it (google-tunix 0.1.7):

-   the trainer makes its manager in its constructor and restores from it a few lines later, so what has to be there by
    then is the class: the subclass made here takes no manager but its own;
-   the manager is asked at every update; whether one is saved is its decision;
-   the loop cannot be ended from within, so after a signal the step is saved and the signal is let through;
-   with LoRA only the LoRA parameters are saved; the frozen rest comes from the base model;
-   of the data the trainer remembers only how many batches it has taken.
"""

from collections.abc import Callable, Mapping
from typing import Any

from flax import nnx

from ..errors import SpecError
from ..save.outcomes import Saved, Started
from ..session.session import Session
from ..spec.spec import CheckpointSpec

type Metrics = Callable[[Any], Mapping[str, Any]]
"""Given the trainer, the metrics of the update that it has just made."""


class _Json:
    """A dict of plain values that may have other keys on the disk than here."""

    def __init__(self, value: Mapping[str, Any]) -> None:
        self.value = dict(value)

    def get_state(self) -> dict[str, Any]:
        return self.value

    def set_state(self, state: dict[str, Any]) -> None:
        self.value = state


class PeftCheckpoints:
    """The methods of tunix's `CheckpointManager`, on a spec.

    The items carry tunix's names, `model_params` and `optimizer_state`.

    Args:
        spec: When to save, what to keep, where.
        metrics: Returns the metrics of the update that was just made.

    Attributes:
        session: The session beneath.
    """

    def __init__(self, spec: CheckpointSpec, metrics: Callable[[], Mapping[str, Any]] = dict) -> None:
        self.session = Session(spec)
        self._metrics = metrics

    def latest_step(self) -> int | None:
        """The newest step that is on the disk."""
        return self.session.latest_step()

    def save(
        self,
        step: int,
        model: Any,
        optimizer: Any = None,
        save_only_lora_params: bool = False,
        force: bool = False,
        custom_metadata: Mapping[str, Any] | None = None,
    ) -> bool:
        """Save if the spec says so, if `force` does, or if a signal has asked this process to stop.

        Returns:
            Whether a save was made or begun.
        """
        state = _make_items(model, optimizer, save_only_lora_params)
        state["custom_metadata"] = _Json(custom_metadata or {})
        if force:
            outcome = self.session.save(step, state, self._metrics(), reason="the trainer asked for it")
        else:
            outcome = self.session.step(step, state, self._metrics())
        if self.session.preempted:
            self.session.leave()
        return isinstance(outcome, Saved | Started)

    def maybe_restore(
        self,
        model: Any,
        optimizer: Any = None,
        step: int | None = None,
        restore_only_lora_params: bool = False,
    ) -> tuple[int, dict[str, Any]]:
        """Fill the model and the optimizer from the newest intact step, or from `step`.

        Returns:
            The step and the trainer's metadata; (0, {}) if there are no steps.

        Raises:
            NoIntactStepError: If there are steps and none is intact.
            StructureError: If the step does not fit; nothing was changed.
        """
        metadata = _Json({})
        state = _make_items(model, optimizer, restore_only_lora_params)
        report = self.session.restore({**state, "custom_metadata": metadata}, "latest" if step is None else step)
        if report.step is None:
            return 0, {}
        if restore_only_lora_params:
            nnx.update(model, report.state["model_params"])
        return report.step, metadata.value

    def close(self) -> None:
        """Wait for the save in progress, raise its error, and give back the signals and the lock."""
        self.session.close()


def _make_items(model: Any, optimizer: Any, only_lora: bool) -> dict[str, Any]:
    items = {"model_params": nnx.state(model, nnx.LoRAParam) if only_lora else model}
    return items if optimizer is None else {**items, "optimizer_state": optimizer}


def peft_trainer[T](trainer_class: type[T], spec: CheckpointSpec, *, metrics: Metrics | None = None) -> type[T]:
    """A class of trainers that save and restore by a spec; otherwise it is `trainer_class`.

    Args:
        trainer_class: tunix's `PeftTrainer` or a subclass.
        spec: When to save, what to keep, where. `checkpoint_root_directory` and `checkpointing_options` of the
            trainer's configuration stay empty.
        metrics: For a spec that looks at metrics, since tunix passes none: given the trainer, returns them, such as
            `lambda trainer: {"loss": trainer.metrics_logger.get_metric("", "loss", "train")}`.

    Raises:
        SpecError: If the spec looks at metrics and there is no `metrics`.
    """
    wanted = sorted(spec.save.get_metric_names() | spec.get_metric_modes().keys())
    if wanted and metrics is None:
        raise SpecError(
            what=f"the spec looks at {', '.join(wanted)} and the trainer passes no metrics.",
            why="without them it would never save or keep by them.",
            fix='peft_trainer(PeftTrainer, spec, metrics=lambda trainer: {"loss": ...})',
        )

    def get_manager(self: Any) -> PeftCheckpoints:
        manager: PeftCheckpoints = self._ckpttools_manager
        return manager

    def set_manager(self: Any, manager: Any) -> None:
        if (folder := self.config.checkpoint_root_directory) is not None:
            raise SpecError(
                what=f"the trainer's configuration has checkpoint_root_directory={folder!r}.",
                why="the spec says where this run is saved, and two managers would each keep a part of it.",
                fix="leave checkpoint_root_directory out of the TrainingConfig.",
            )
        manager.close()
        self._ckpttools_manager = PeftCheckpoints(spec, lambda: metrics(self) if metrics else {})

    namespace = {"checkpoint_manager": property(get_manager, set_manager), "__module__": trainer_class.__module__}
    return type(trainer_class.__name__, (trainer_class,), namespace)
