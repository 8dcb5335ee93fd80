# SPDX-License-Identifier: Apache-2.0
"""The object that `ct.open` returns: what a training loop calls.

Each step is decided in `loop`, saved by `saver`, and restored by `resume`; `resources` holds what is open, and
`closing` releases it. Two rules hold them together: a step that is reported as latest is on the disk, and an error of a
background save is raised by the very next call.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from types import TracebackType
from typing import Any, Literal, Self

from ..errors import CheckpointError, StepOrderError
from ..mirror.status import MirrorStatus
from ..restore.report import RestoreReport
from ..restore.select import Selector
from ..restore.validation import Validate
from ..save.outcomes import Failed, Outcome, Saved
from ..spec.operations import Operation
from ..spec.spec import CheckpointSpec
from ..spec.state import as_rules
from . import resume
from .advice import warn
from .closing import Closing, save_last_step
from .last_step import LastStep
from .loop import TrainingLoop
from .resources import RunResources
from .signals import DEFAULT_SIGNALS, as_signals

type OnError = Literal["raise", "return"]


class Session:
    """A run that is open for saving and restoring; use it in a `with` statement.

    Args:
        spec: When to save, what to keep, where.
        validate: As for `ct.open`.
        signals: As for `ct.open`.
        save_on_exception: As for `ct.open`.

    Attributes:
        spec: The spec it was opened with.
        directory: The run's directory, absolute.

    Example:
        >>> import tempfile
        >>> import numpy as np
        >>> import ckpttools as ct
        >>> spec = ct.CheckpointSpec(directory=tempfile.mkdtemp(), save=ct.EverySteps(2))
        >>> state = {"params": np.zeros(2)}
        >>> with ct.open(spec) as ckpt:
        ...     report = ckpt.restore(state)
        ...     for step in ckpt.steps(5):
        ...         state["params"] += 1
        ...         outcome = ckpt.step(step, state)
        ...     print(ckpt.all_steps(), outcome.reason)
        (2, 4, 5) the final step
    """

    def __init__(
        self,
        spec: CheckpointSpec,
        validate: Validate | None = None,
        *,
        signals: Iterable[str | int] = DEFAULT_SIGNALS,
        save_on_exception: bool = False,
    ) -> None:
        stop_signals = as_signals(signals)
        self._resources = RunResources(spec, validate)
        self.spec = spec
        self.directory = self._resources.directory
        self._loop = TrainingLoop(self._resources, self.close, stop_signals)
        self._saver = self._loop.saver
        self._closing = Closing(self._resources, self._loop)
        self._last_step = LastStep(as_rules(spec.exclude)) if save_on_exception else None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        obstacle = ""
        try:
            if error is not None and self._last_step is not None:
                obstacle = save_last_step(self._resources, self._loop, self._last_step, error)
        finally:
            self._closing.close(raise_errors=error is None)
        warn(self._loop.describe_unsaved(error, obstacle))

    def close(self, *, raise_errors: bool = True) -> None:
        """Wait for the save in progress and its copy at the mirror, and release the signal handlers and the lock.

        Called by the `with` statement. After a second SIGTERM or SIGINT it does not wait; the save in progress is
        then committed completely or not at all.

        Args:
            raise_errors: Whether to raise the error of the save in progress; False to warn of it instead.

        Raises:
            CheckpointError: If the save in progress failed.
            StepOrderError: If it is called in the middle of another call of this session.
        """
        self._closing.close(raise_errors=raise_errors)
        warn(self._loop.describe_unsaved())

    @property
    def preempted(self) -> bool:
        """Whether the run was asked to stop: by a signal, a preemption notice, or `request_stop`."""
        return self._loop.stop_request.reason is not None

    def request_stop(self, reason: str = "request_stop() asked to stop") -> None:
        """Request a stop, as a signal does: the next call of `step` saves, and the loop ends there.

        May be called from any thread or signal handler.

        Args:
            reason: Recorded with the step.

        Example:
            >>> import tempfile
            >>> import ckpttools as ct
            >>> with ct.open(ct.CheckpointSpec(directory=tempfile.mkdtemp())) as ckpt:
            ...     for step in ckpt.steps(100):
            ...         if step == 3:
            ...             ckpt.request_stop("the budget is used up")
            ...         outcome = ckpt.step(step, {"count": step})
            ...     print(ckpt.all_steps(), outcome.reason)
            (3,) the budget is used up
        """
        self._loop.stop_request.ask(reason)

    @property
    def mirror_status(self) -> MirrorStatus | None:
        """What the mirror holds and lacks; None if the spec has no mirror."""
        return None if self._resources.uploader is None else self._resources.uploader.status

    @property
    def failure(self) -> BaseException | None:
        """The error of a background save that has ended, which the next call raises; None if there is none."""
        return self._saver.failure

    def all_steps(self) -> tuple[int, ...]:
        """Return the committed steps of the run's current branch, in increasing order."""
        return self._resources.list_steps()

    def latest_step(self) -> int | None:
        """Return the newest committed step of the run's current branch; None if there is none."""
        return max(self.all_steps(), default=None)

    def best_step(self, metric: str | None = None, mode: Literal["min", "max"] | None = None) -> int | None:
        """Return the committed step with the best value of a metric; None without steps.

        Args:
            metric: Name of the metric; by default the one that the spec names.
            mode: "min" if smaller is better, "max" if larger is better; by default the mode that the spec names.

        Raises:
            SpecError: If the spec does not say which metric or mode is meant.

        Example:
            >>> import tempfile
            >>> import numpy as np
            >>> import ckpttools as ct
            >>> spec = ct.CheckpointSpec(directory=tempfile.mkdtemp(), keep=ct.Latest(3) | ct.Best("loss", mode="min"))
            >>> with ct.open(spec) as ckpt:
            ...     for step, loss in [(1, 0.5), (2, 0.1), (3, 0.4)]:
            ...         outcome = ckpt.save(step, {"params": np.zeros(2)}, {"loss": loss})
            ...     saved = ckpt.wait()
            ...     ckpt.best_step()
            2
        """
        return self._resources.find_best_step(metric, mode)

    def pin(self, step: int, *, pinned: bool = True) -> None:
        """Protect a committed step from retention.

        Waits for a save in progress: it may be the step in question, and it deletes what retention does not keep.

        Args:
            step: The step.
            pinned: False to stop protecting it.

        Raises:
            StepNotFoundError: If that step does not exist.
        """

        def pin() -> None:
            self._saver.wait()
            self._resources.pin(step, pinned=pinned)

        self._resources.guard.run(pin)

    def delete(self, step: int) -> None:
        """Delete a committed step, whatever the spec keeps; the newest cannot be deleted.

        Args:
            step: The step.

        Raises:
            StepNotFoundError: If that step does not exist.
            StepOrderError: If it is the newest.
        """

        def delete() -> None:
            self._saver.wait()
            self._resources.delete(step)

        self._resources.guard.run(delete)

    def leave(self) -> None:
        """Close, and deliver the signal that asked to stop again: for a loop that cannot be ended from here."""
        self.close()
        self._loop.stop_request.redeliver()

    def restore(
        self, state: Mapping[str, Any], step: Selector = "latest", *, surgery: Iterable[Operation] = ()
    ) -> RestoreReport:
        """Restore a step into `state`, passing over damaged ones, and continue the run from it.

        Args:
            state: Items by name. Live objects are filled in place; everything else is in the report's `state`. Items
                may be omitted, and abstract ones (`nnx.eval_shape`) are accepted.
            step: "latest", a number, `ct.best(metric)`, or `ct.BranchStep(step, branch)`.
            surgery: What to do to a step that does not fit. An operation is applied once in a run: steps that are
                saved afterwards record it, so that a restart of the same program does not apply it again.

        Returns:
            What was restored and what was passed over; its `step` is None if the directory holds no steps.

        Raises:
            NoIntactStepError: If there are steps and none is intact.
            StructureError: If the step does not fit `state`; nothing was changed.
            VersionError: If the spec's state version has no migration from the step's version.
            StepNotFoundError: If that step does not exist.
            StorageError: If the disk cannot be read.

        Example:
            >>> import tempfile
            >>> import numpy as np
            >>> import ckpttools as ct
            >>> spec = ct.CheckpointSpec(directory=tempfile.mkdtemp())
            >>> with ct.open(spec) as ckpt:
            ...     outcome = ckpt.save(100, {"params": np.arange(3)})
            >>> with ct.open(spec) as ckpt:
            ...     report = ckpt.restore({"params": np.zeros(3, int)})
            >>> report.step, report.state["params"]
            (100, array([0, 1, 2]))
        """
        return self._resources.guard.run(lambda: resume.restore(self._resources, self._loop, state, step, surgery))

    def steps(self, total: int) -> Iterator[int]:
        """Return an iterator over the remaining steps: from the one after the restored step to `total`.

        It ends early, with that step saved, if the process was asked to stop.

        Args:
            total: Completed updates at the end of the training.

        Raises:
            NotRestoredError: If the directory holds steps and `restore` was not called.
            StepOrderError: If `total` is not a count.
        """
        return self._loop.iterate(total)

    def step(
        self,
        step: int,
        state: Mapping[str, Any],
        metrics: Mapping[str, Any] | None = None,
        *,
        on_error: OnError = "raise",
    ) -> Outcome:
        """Report a completed step; saves it if the spec says so, if it is the last, or if a stop was requested.

        Args:
            step: Completed updates, from 1.
            state: Items by name.
            metrics: Values of this step by name; those that the spec does not use are only read if it is saved.
            on_error: "raise", or "return" to return `Failed`.

        Returns:
            `Skipped` if no save was due, `Started` for a background save, `Saved` for one that was waited for (the
            last step, a stop, or `asynchronous=False`), `Failed` with `on_error="return"`; each with its reason.

        Raises:
            CheckpointError: If this save failed, or the previous one in the background; no older step is lost.
            NotRestoredError: If the directory holds steps and `restore` was not called.
            StepOrderError: If the step is not a count of completed updates, or is behind one that was passed before.
            LeafError: If the state or the metrics hold something that cannot be saved.

        Example:
            >>> import tempfile
            >>> import ckpttools as ct
            >>> spec = ct.CheckpointSpec(directory=tempfile.mkdtemp(), save=ct.EverySteps(2))
            >>> with ct.open(spec) as ckpt:
            ...     ckpt.step(1, {"count": 1})
            Skipped(step=1, reason='not due: every 2 steps', finished=None)
        """

        def report() -> Outcome:
            outcome = self._loop.step(step, state, metrics or {})
            if self._last_step is not None:
                self._last_step.record(step, state, metrics or {})
            return outcome

        return self._run_guarded(step, on_error, report)

    def save(
        self,
        step: int,
        state: Mapping[str, Any],
        metrics: Mapping[str, Any] | None = None,
        *,
        reason: str = "asked for",
        on_error: OnError = "raise",
    ) -> Outcome:
        """Save now, whatever the triggers say; step 0 is the state before the first update.

        Args:
            step: Completed updates, from 0.
            state: Items by name.
            metrics: Values to record by name.
            reason: Recorded with the step.
            on_error: "raise", or "return" to return `Failed`.

        Returns:
            `Started` for a background save, `Saved` with `asynchronous=False`, `Skipped` if this step is saved
            already, `Failed` with `on_error="return"`.

        Raises:
            CheckpointError: If this save failed, or the previous one in the background; no older step is lost.
            NotRestoredError: If the directory holds steps and `restore` was not called.
            StepOrderError: If the step is not a count of completed updates, or is behind one that was passed before.
            LeafError: If the state or the metrics hold something that cannot be saved.

        Example:
            >>> import tempfile
            >>> import numpy as np
            >>> import ckpttools as ct
            >>> spec = ct.CheckpointSpec(directory=tempfile.mkdtemp(), storage=ct.Storage(asynchronous=False))
            >>> with ct.open(spec) as ckpt:
            ...     ckpt.save(100, {"params": np.zeros(2)}, reason="before evaluation").path.name
            '100'
        """
        return self._run_guarded(step, on_error, lambda: self._loop.save(step, state, metrics or {}, reason))

    def save_now(self, state: Mapping[str, Any], *, reason: str, metrics: Mapping[str, Any] | None = None) -> Outcome:
        """Save the step that was last passed to `step`.

        Args:
            state: Items by name.
            reason: Recorded with the step, such as "before evaluation".
            metrics: Values to record by name.

        Raises:
            StepOrderError: If no step was passed or restored yet.
            CheckpointError: If this save failed, or the previous one in the background.
        """
        step = self._loop.progress.step
        if step == 0:
            raise StepOrderError(
                what="save_now() was called before the first step.",
                why="nothing differs from a fresh start yet.",
                fix="ckpt.save(step, state) saves under a number of your choice.",
            )
        return self.save(step, state, metrics, reason=reason)

    def wait(self) -> Saved | None:
        """Wait until the save in progress is on the disk.

        Returns:
            The save that has ended and was not reported yet; None if there is none.

        Raises:
            CheckpointError: If the save failed.
            SaveTimeoutError: After `storage.timeout_s`.
        """

        def wait() -> Saved | None:
            self._saver.wait()
            return self._saver.take_finished()

        return self._resources.guard.run(wait)

    def _run_guarded(self, step: int, on_error: OnError, action: Callable[[], Outcome]) -> Outcome:
        self._resources.warn_of_mirror()
        try:
            return self._resources.guard.run(action)
        except CheckpointError as error:
            if on_error == "return":
                return Failed(step=step, error=error, finished=self._saver.take_finished())
            raise
