# SPDX-License-Identifier: Apache-2.0
"""Run tunix's `PeftTrainer` with a spec, by replacing its checkpoint manager.

Nothing here imports tunix, and no module of it is patched. Facts that shaped it (google-tunix 0.1.7):

-   the trainer creates its manager in its constructor and restores from it a few lines later, so the class itself must
    replace the manager: the subclass made here ignores any manager that is assigned;
-   the trainer calls `save` after every update, and the manager decides whether to save;
-   the loop cannot be ended from within, so after a signal the step is saved and the signal is raised again;
-   with LoRA only the LoRA parameters are saved; the frozen rest comes from the base model;
-   of its data, the trainer records only how many batches it has read.
"""

from collections.abc import Callable, Mapping
from typing import Any

from flax import nnx

from ..errors import SpecError
from ..save.outcomes import Saved, Started
from ..session.session import Session
from ..spec.spec import CheckpointSpec

type Metrics = Callable[[Any], Mapping[str, Any]]
"""Given the trainer, returns the metrics of the last update."""


class _Json:
    """A dict of plain values whose keys on disk may differ from those in memory."""

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
        spec: Where and when to save, and what to keep.
        metrics: Returns the metrics of the last update.

    Attributes:
        session: The underlying session.

    Example:
        >>> import tempfile
        >>> from flax import nnx
        >>> import ckpttools as ct
        >>> manager = ct.PeftCheckpoints(ct.CheckpointSpec(directory=tempfile.mkdtemp()))
        >>> manager.save(1, nnx.Linear(2, 3, rngs=nnx.Rngs(0)), force=True, custom_metadata={"role": "actor"})
        True
        >>> manager.maybe_restore(nnx.Linear(2, 3, rngs=nnx.Rngs(1)))
        (1, {'role': 'actor'})
        >>> manager.close()
    """

    def __init__(self, spec: CheckpointSpec, metrics: Callable[[], Mapping[str, Any]] = dict) -> None:
        self.session = Session(spec)
        self._metrics = metrics

    def latest_step(self) -> int | None:
        """Return the newest step on disk; None if there is none."""
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
        """Save if the spec says so, if `force` is true, or if a signal has asked this process to stop.

        Args:
            step: Completed updates.
            model: The model.
            optimizer: Its optimizer; None to save none.
            save_only_lora_params: Whether to save the LoRA parameters only.
            force: Whether to save regardless of the spec.
            custom_metadata: Plain values of the trainer.

        Returns:
            Whether a save was made or started.
        """
        state = _make_items(model, optimizer, save_only_lora_params)
        state["custom_metadata"] = _Json(custom_metadata or {})
        if force:
            outcome = self.session.save(step, state, self._metrics(), reason="requested by the trainer")
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
            The step and the trainer's metadata; (0, {}) if the run has no steps.

        Raises:
            NoIntactStepError: If the run has steps and none is intact.
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
        """Wait for the save in progress, raise its error, and release the signal handlers and the lock."""
        self.session.close()


def _make_items(model: Any, optimizer: Any, only_lora: bool) -> dict[str, Any]:
    items = {"model_params": nnx.state(model, nnx.LoRAParam) if only_lora else model}
    return items if optimizer is None else {**items, "optimizer_state": optimizer}


def peft_trainer[T](trainer_class: type[T], spec: CheckpointSpec, *, metrics: Metrics | None = None) -> type[T]:
    """Return a subclass of a tunix trainer that saves and restores by a spec.

    Args:
        trainer_class: tunix's `PeftTrainer` or a subclass.
        spec: Where and when to save, and what to keep. `checkpoint_root_directory` and `checkpointing_options` of the
            trainer's configuration stay empty.
        metrics: Given the trainer, returns the metrics that the spec uses, since tunix passes none, such as
            `lambda trainer: {"loss": trainer.metrics_logger.get_metric("", "loss", "train")}`.

    Raises:
        SpecError: If the spec uses metrics and `metrics` is None.

    Example:
        >>> import ckpttools as ct
        >>> class Trainer: ...  # tunix.PeftTrainer
        >>> ct.peft_trainer(Trainer, ct.CheckpointSpec(directory="runs/a")).__name__
        'Trainer'
    """
    names = sorted(spec.save.get_metric_names() | spec.get_metric_modes().keys())
    if names and metrics is None:
        raise SpecError(
            what=f"the spec uses {', '.join(names)}, but the trainer passes no metrics.",
            why="the rules that need them would never apply.",
            fix='peft_trainer(PeftTrainer, spec, metrics=lambda trainer: {"loss": ...})',
        )

    def get_manager(self: Any) -> PeftCheckpoints:
        manager: PeftCheckpoints = self._ckpttools_manager
        return manager

    def set_manager(self: Any, manager: Any) -> None:
        if (root := self.config.checkpoint_root_directory) is not None:
            raise SpecError(
                what=f"the trainer's configuration has checkpoint_root_directory={root!r}.",
                why="the spec already names the directory, and two managers would each save part of the run.",
                fix="leave checkpoint_root_directory out of the TrainingConfig.",
            )
        manager.close()
        self._ckpttools_manager = PeftCheckpoints(spec, lambda: metrics(self) if metrics else {})

    namespace = {"checkpoint_manager": property(get_manager, set_manager), "__module__": trainer_class.__module__}
    return type(trainer_class.__name__, (trainer_class,), namespace)
