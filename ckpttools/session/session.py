# SPDX-License-Identifier: Apache-2.0
"""A run in progress: the object that `ct.open` returns.

The surface of a run: what a training loop calls, in what order, and what it is told. Where the run stands is in
`course`, its saves are in `background`, what it goes on from is found by `resuming`. Two rules hold it together: what
is called latest is on the disk, and an error of a save in the background is raised by the very next call.
"""

import atexit
import dataclasses
import os
import pathlib
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import TracebackType
from typing import Any, Literal, Self

from ..errors import (
    CheckpointError,
    CheckpointWarning,
    NotRestoredError,
    SpecError,
    StepNotFoundError,
    StepOrderError,
    StorageError,
)
from ..mirror.upload import MirrorStatus, MirrorUploader
from ..processes import group, opening
from ..restore import recovery, select, validation
from ..restore.report import RestoreReport
from ..restore.select import BestStep, Selector
from ..save.outcomes import Failed, Outcome, Saved, Skipped, Started
from ..save.worker import Worker
from ..spec.mirror import as_mirror
from ..spec.operations import Operation, as_code
from ..spec.spec import CheckpointSpec
from ..spec.surgery import Surgery
from ..spec.trigger_memory import decode_memory
from ..spec.triggers import StepContext
from ..store.run_directory import RunDirectory
from ..surgery.altered_leaves import list_altered_leaves
from ..tree.items import require_items
from ..tree.write_back import fill_state
from . import advice, resume
from .progress import RunProgress
from .saver import Saver
from .signals import StopRequest
from .turn import SessionLock

type OnError = Literal["raise", "return"]


class Session:
    """A run that is open for saving and restoring; use it in a `with` statement.

    Attributes:
        spec: The spec it was opened with.
        directory: The run's folder, absolute.
    """

    def __init__(self, spec: CheckpointSpec, validate: validation.Validate | None = None) -> None:
        if not isinstance(spec, CheckpointSpec):
            raise SpecError(
                what=f"a run is opened by a CheckpointSpec, not by {spec!r:.200}.",
                why="the spec says when to save and what to keep, not only where.",
                fix='ct.open(ct.CheckpointSpec(directory="runs/a", save=ct.EverySteps(500)))',
            )
        self.spec = spec
        self.directory = pathlib.Path(os.path.abspath(spec.directory))
        self._run = RunDirectory(self.directory)
        self._group = group.make_group(spec.storage.timeout_s)
        try:
            opening.open_run(self._group, self._run, spec, has_validation=validate is not None)
        except CheckpointError:
            self._group.close()
            raise
        self._validate = validate
        mirror = as_mirror(spec.mirror)
        self._uploader = None if mirror is None else MirrorUploader(self.directory, mirror, spec.keep)
        self._stop_request = StopRequest()
        self._lock = SessionLock(spec.storage.timeout_s)
        self._stall_meter = advice.StallMeter()
        self._metric_watch = advice.MetricWatch({*spec.save.get_metric_names(), *spec.get_metric_modes()})
        self._run_progress = RunProgress(spec.save, self._run)
        self._saver = Saver(
            spec=spec,
            run=self._run,
            group=self._group,
            uploader=self._uploader,
            validate=validate,
            run_progress=self._run_progress,
        )
        self._final_step: int | None = None
        self._is_writing = False
        self._is_stopping = False
        self._is_closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(raise_errors=kind is None)

    def close(self, *, raise_errors: bool = True) -> None:
        """Wait for the save in progress and its copy, raise its error, and give back the signals and the lock."""
        # Whoever has asked twice to stop does not want to wait: the save in progress is committed wholly or not at all.
        waits = not self._stop_request.is_repeated
        try:
            try:
                if waits:
                    self.wait()
            finally:
                if self._uploader is not None and waits:
                    self._uploader.close()
                    self._warn_of_mirror()
        except CheckpointError as failure:
            if raise_errors:
                raise
            # Another error is on its way out; this one must not hide it, nor be lost.
            warnings.warn(f"the save in progress failed: {failure}", CheckpointWarning, stacklevel=2)
        finally:
            atexit.unregister(self.close)
            self._is_closed = True
            self._stop_request.restore_handlers()
            self._group.close()
            # A save that did not end in time still writes: until it has ended, no other process may.
            self._saver.add_done_callback(self._release)

    def _release(self) -> None:
        self._run.lock.release()
        self._saver.buffers.clear()

    @property
    def preempted(self) -> bool:
        """Whether this process was asked to stop; `steps` ends after the step that sees it."""
        return self._stop_request.reason is not None

    @property
    def mirror_status(self) -> MirrorStatus | None:
        """How far the mirror is; None if the spec has none."""
        return None if self._uploader is None else self._uploader.status

    def all_steps(self) -> tuple[int, ...]:
        """Steps of the run's own branch that are committed, in increasing order."""
        return tuple(sorted(entry.step for entry in self._run.refresh_steps().live_entries))

    def latest_step(self) -> int | None:
        """The newest committed step of the run's own branch."""
        return max(self.all_steps(), default=None)

    def best_step(self, metric: str | None = None, mode: Literal["min", "max"] | None = None) -> int | None:
        """The committed step with the best value of a metric, by default the one that the spec names."""
        selector = select.resolve_mode(
            self.spec, BestStep(metric, mode) if metric else select.make_best_selector(self.spec)
        )
        try:
            return select.list_candidates(self._run.refresh_steps(), selector)[0].step
        except StepNotFoundError:
            return None

    def pin(self, step: int, *, pinned: bool = True) -> None:
        """Protect a committed step from retention, or with `pinned=False` no longer.

        Waits for a save in progress: it may be the step in question, and it deletes what nobody keeps.

        Raises:
            StepNotFoundError: If there is no such step.
        """
        with self._lock:
            self.wait()
            self._group.broadcast(f"the pin of step {step}", lambda: self._run.pin(step, pinned=pinned))

    def delete(self, step: int) -> None:
        """Delete a committed step, whatever the spec keeps; the newest cannot be deleted.

        Raises:
            StepNotFoundError: If there is no such step.
            StepOrderError: If it is the newest.
        """
        with self._lock:
            self.wait()
            self._group.broadcast(f"the deletion of step {step}", lambda: self._delete(step))

    def _delete(self, step: int) -> None:
        held = self._run.lock.is_held
        self._run.lock_for_writing()
        try:
            self._run.delete(step)
        finally:
            if not held:
                self._run.lock.release()

    @property
    def failure(self) -> BaseException | None:
        """The error of a background save that has ended, which the next call raises; None if there is none."""
        return self._saver.failure

    def leave(self) -> None:
        """Close, and let the signal that asked to stop end the process: for a loop that cannot be ended from here."""
        self.close()
        self._stop_request.redeliver()

    def restore(
        self, state: Mapping[str, Any], step: Selector = "latest", *, surgery: Iterable[Operation] = ()
    ) -> RestoreReport:
        """Restore a step into `state`, passing over damaged ones.

        Args:
            state: Items by name. Live objects are filled in place; the rest is in the report's `state`. Items may be
                left out, and abstract ones (`nnx.eval_shape`) are accepted.
            step: "latest", a number, or `ct.best(metric)`.
            surgery: What to do to a step that does not fit. An operation is applied once in a run: steps that are
                saved afterwards remember it, so that a restart of the same program does not do it again.

        Returns:
            What was restored and what was passed over; `.step` is None in an empty directory.

        Raises:
            NoIntactStepError: If there are steps and none is intact.
            StructureError: If the step does not fit `state`; nothing was changed.
            VersionError: If the step is of a version that is not known here.
            StepNotFoundError: If `step` is not there.
            StorageError: If the disk does not answer.
        """
        with self._lock:
            return self._restore(state, step, Surgery(surgery))

    def _restore(self, state: Mapping[str, Any], step: Selector, surgery: Surgery) -> RestoreReport:
        began = time.monotonic()
        require_items(state)
        self.wait()
        loaded, report = resume.load(
            state,
            step,
            spec=self.spec,
            run=self._run,
            group=self._group,
            uploader=self._uploader,
            validate=self._validate,
            surgery=surgery,
        )
        if report.mirror_error:
            self._warn(f"only local steps were looked at: {report.mirror_error}")
        codes = tuple(map(as_code, surgery))
        if loaded is None:
            if any(candidate.verdict != "empty" for candidate in report.candidates):
                raise recovery.make_no_intact_step_error(report, self.directory)
            # A state that begins here has the new form already.
            self._run_progress.surgery = codes
            self._run_progress.begin()
            return report
        filled = fill_state(state, loaded.items)
        summary, contents = loaded.manifest.summary, loaded.manifest.contents
        self._run_progress.begin(
            summary.step, summary.lineage, decode_memory(self.spec.save, contents.triggers), summary.run_s
        )
        self._run_progress.surgery = tuple(dict.fromkeys([*contents.surgery, *codes]))
        self._warn(
            advice.advise_on_retention(
                rejected_count=report.damaged, intact_count=len(self._run.get_steps().live_entries)
            )
        )
        return dataclasses.replace(
            report,
            step=summary.step,
            state=filled,
            metrics=dict(summary.metrics),
            seconds=time.monotonic() - began,
            altered=list_altered_leaves(loaded.plan),
        )

    def _warn_of_mirror(self) -> None:
        for note in self._uploader.take_notes() if self._uploader else ():
            self._warn(note)

    def _begin_training(self) -> None:
        """Make sure that this process may go on with the run, and is the only one that does."""
        if self._is_closed:
            raise StepOrderError(
                what=f"the run in {self.directory} is closed.",
                why="after the with block nobody waits for a save in the background, nor learns of its error.",
                fix="call step() and save() inside `with ct.open(spec) as ckpt:`.",
            )
        if not self._run_progress.has_begun:
            if self._run.is_used():
                raise NotRestoredError(
                    what=f"{self.directory} holds steps and none was restored.",
                    why="training from the start would supersede the run that is there.",
                    fix="report = ckpt.restore(state) before the loop, or another directory for a new run.",
                )
            self._run_progress.begin()
        if not self._is_writing:
            self._group.broadcast("the beginning", self._begin_writing)
            self._is_writing = True

    def _begin_writing(self) -> None:
        self._run.lock_for_writing()
        self._run_progress.branch()
        if self._uploader is not None:
            # What an earlier session could not copy.
            self._uploader.update(self._run.get_steps())

    def steps(self, total: int) -> Iterator[int]:
        """The steps that are left: from the one after the restored step to `total`.

        Ends early, with that step saved, when the process was asked to stop.

        Raises:
            NotRestoredError: If the directory is in use and `restore` was not called.
        """
        self._begin_training()
        if type(total) is not int or total < 0:
            raise StepOrderError(
                what=f"steps({total!r}) is no number of steps.",
                why="it yields the completed updates up to that one.",
                fix="steps(10_000)",
            )
        return self._iterate_steps(total)

    def _iterate_steps(self, total: int) -> Iterator[int]:
        self._final_step = total
        self._stop_request.install_handlers()
        for step in range(self._run_progress.step + 1, total + 1):
            yield step
            if self._is_stopping:
                return
        # There is no later step that could honour the wish to stop, so a signal ends the process as it always did.
        self._stop_request.restore_handlers()
        if self._run_progress.step < total:
            self._warn(
                f"the final step {total} was not passed to step(), so it is not saved. Call ckpt.step(step, state) "
                "at the end of every step; it saves only when the spec says so."
            )

    def step(
        self,
        step: int,
        state: Mapping[str, Any],
        metrics: Mapping[str, Any] | None = None,
        *,
        on_error: OnError = "raise",
    ) -> Outcome:
        """Tell that a step is complete; saves if the spec says so, if it is the last, or if a stop was asked for.

        Args:
            step: Completed updates.
            state: Items by name.
            metrics: Values of this step; those that the spec does not look at are only read when it is saved.
            on_error: "raise", or "return" to get `Failed`.

        Returns:
            `Skipped` if nothing was due, `Started` for a save in the background, `Saved` for one that was waited for
            (the last step, a stop, or `asynchronous=False`); each with its reason.

        Raises:
            CheckpointError: If this save failed, or the one before it in the background; nothing older is lost.
            NotRestoredError: If the directory holds steps and `restore` was not called.
            StepOrderError: If the step is no count of completed updates, or lies behind one that was passed.
            LeafError: If the state or the metrics hold what cannot be saved.
        """
        return self._run_locked(step, on_error, lambda: self._step(step, state, metrics or {}))

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
            step: Completed updates.
            state: Items by name.
            metrics: Values to record.
            reason: Recorded with the step.
            on_error: As in `step`.

        Returns:
            As `step`; `Skipped` if this step is saved already.

        Raises:
            CheckpointError: As in `step`.
        """

        def run() -> Outcome:
            self._begin_training()
            finished = self.wait()
            return self._save(
                self._run_progress.make_context(step, metrics or {}, minimum=0), state, metrics or {}, reason, finished
            )

        return self._run_locked(step, on_error, run)

    def save_now(self, state: Mapping[str, Any], *, reason: str, metrics: Mapping[str, Any] | None = None) -> Outcome:
        """Save the step that was last passed to `step`, for a reason of yours such as "before evaluation"."""
        if self._run_progress.step == 0:
            raise StepOrderError(
                what="save_now() was called before the first step.",
                why="there is nothing yet that differs from a fresh start.",
                fix="ckpt.save(step, state) saves under a number of your choice.",
            )
        return self.save(self._run_progress.step, state, metrics, reason=reason)

    def wait(self) -> Saved | None:
        """Wait until the save in progress is on the disk, and raise its error.

        Raises:
            SaveTimeoutError: After `storage.timeout_s`.
        """
        saved = self._saver.wait()
        self._warn(saved.trouble if saved else None)
        return saved

    def _run_locked(self, step: int, on_error: OnError, action: Callable[[], Outcome]) -> Outcome:
        self._warn_of_mirror()
        try:
            with self._lock:
                return action()
        except CheckpointError as error:
            if on_error == "return":
                return Failed(step=step, error=error)
            raise

    def _step(self, step: int, state: Mapping[str, Any], metrics: Mapping[str, Any]) -> Outcome:
        self._begin_training()
        self._stop_request.install_handlers()
        moment = self._run_progress.make_context(step, metrics)
        self._group.request_stop(self._stop_request.get_reason(step))
        verdict = self._group.broadcast(f"step {step}", lambda: self._decide_step(moment))
        finished = self.wait() if verdict["ended"] else None
        self._warn(self._metric_watch.add(metrics, is_last=step == self._final_step))
        if stop := verdict["stop"]:
            self._stop_request.reason = stop
        if not (stop or step == self._final_step or verdict["due"]):
            self._run_progress.step = step
            return Skipped(step=step, reason=f"not due: {verdict['reason']}", finished=finished)
        reason = stop or ("the final step" if step == self._final_step else verdict["reason"])
        must_last = stop is not None or step == self._final_step
        outcome = self._save(moment, state, metrics, reason, finished, blocking=must_last)
        self._is_stopping = stop is not None
        return outcome

    def _decide_step(self, context: StepContext) -> dict[str, Any]:
        """What is to be done at a step, as plain data: the leader decides for all."""
        ended = self._saver.has_ended
        stop = self._stop_request.reason or self._group.get_stop_request()
        if self.failure is not None:
            # It is raised next, in all processes.
            return {"ended": ended, "stop": stop, "due": False, "reason": ""}
        decision = self._run_progress.decide(context)
        return {"ended": ended, "stop": stop, "due": decision.save, "reason": decision.reason}

    def _save(
        self,
        context: StepContext,
        state: Mapping[str, Any],
        metrics: Mapping[str, Any],
        reason: str,
        finished: Saved | None,
        *,
        blocking: bool = False,
    ) -> Outcome:
        began = time.monotonic()
        require_items(state)
        finished = self.wait() or finished
        asynchronous = self.spec.storage.asynchronous and not blocking
        worker = self._saver.begin(context, state, metrics, reason=reason, start_time=began, asynchronous=asynchronous)
        if worker is None:
            return Skipped(step=context.step, reason="this step is saved already", finished=finished)
        if asynchronous:
            # A program that ends without `close` would lose this save without a word.
            atexit.unregister(self.close)
            atexit.register(self.close)
            stall_s = worker.stall_s = time.monotonic() - began
            self._warn(self._stall_meter.add(now_s=time.monotonic(), step=context.step, stall_s=stall_s))
            return Started(step=context.step, reason=reason, stall_s=stall_s, finished=finished)
        return self._wait_blocking(worker, began, record_stall=not blocking)

    def _wait_blocking(self, worker: Worker, start_time: float, *, record_stall: bool) -> Saved:
        try:
            saved = self.wait()
        except BaseException:
            # The save looks at the live arrays, not at copies; once the program goes on it must not be committed.
            worker.is_abandoned.set()
            raise
        if saved is None:
            raise StorageError(
                what=f"the save of step {worker.step} ended without a result.",
                why="the thread that wrote it ended before the commit, so the step is not there.",
                fix="save again; `ckpt.latest_step()` names the newest step on the disk.",
            )
        stall_s = time.monotonic() - start_time
        if record_stall:
            self._warn(self._stall_meter.add(now_s=time.monotonic(), step=worker.step, stall_s=stall_s))
        return dataclasses.replace(saved, stall_s=stall_s)

    def _warn(self, text: str | None) -> None:
        if text:
            warnings.warn(text, CheckpointWarning, stacklevel=4)
