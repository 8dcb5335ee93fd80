# SPDX-License-Identifier: Apache-2.0
"""A run in progress: the object that `ct.open` returns.

Knows when (the spec's triggers), what (the state passed in) and where (the run's folder), and leaves the how to
`saving` and `recovery`. Two rules hold it together: what is called latest is on the disk, and an error of a save in
the background is raised by the very next call.
"""

import dataclasses
import os
import pathlib
import secrets
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from types import TracebackType
from typing import Any, Literal, Self

from . import recovery, saving
from .errors import (
    CheckpointError,
    CheckpointWarning,
    LeafError,
    NotRestoredError,
    SaveTimeoutError,
    SpecError,
    StepNotFoundError,
    StepOrderError,
    StorageError,
)
from .outcomes import Failed, Outcome, Saved, Skipped, Started
from .recovery import BestStep, Selector
from .report import RestoreReport
from .signals import StopRequest
from .spec import retention
from .spec.spec import CheckpointSpec
from .spec.triggers import Moment
from .state import snapshot
from .store import catalogue, commit, manifest
from .store.lock import WriterLock

type OnError = Literal["raise", "return"]


class Session:
    """A run that is open for saving and restoring; use it in a `with` statement.

    Attributes:
        spec: The spec it was opened with.
        directory: The run's folder, absolute.
    """

    def __init__(self, spec: CheckpointSpec) -> None:
        self.spec = spec
        self.directory = pathlib.Path(os.path.abspath(spec.directory))
        commit.require_writable(self.directory)
        self._catalogue = catalogue.scan(self.directory)
        self._lock = WriterLock(self.directory)
        self._stop = StopRequest()
        self._worker: _Worker | None = None
        self._buffers: snapshot.Buffers = {}
        self._memory: Any = None
        self._lineage: manifest.Lineage = ()
        self._restored = False
        self._position = 0
        self._final_step: int | None = None
        self._run_s_before = 0.0
        self._started_at = time.monotonic()
        self._left = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(raise_errors=kind is None)

    def close(self, *, raise_errors: bool = True) -> None:
        """Wait for the save in progress, raise its error, and give back the signals and the lock."""
        try:
            self.wait()
        except CheckpointError as failure:
            if raise_errors:
                raise
            # Another error is on its way out; this one must not hide it, nor be lost.
            warnings.warn(f"the save in progress failed: {failure}", CheckpointWarning, stacklevel=2)
        finally:
            self._stop.forget()
            self._lock.release()
            self._buffers.clear()

    @property
    def preempted(self) -> bool:
        """Whether a signal asked this process to stop; `steps` ends after the step that sees it."""
        return self._stop.received is not None

    # What is there

    def _steps_now(self) -> catalogue.Catalogue:
        # Whoever holds the lock knows all changes; a reader has to look.
        if not self._lock.held:
            self._catalogue = catalogue.scan(self.directory)
        return self._catalogue

    def all_steps(self) -> tuple[int, ...]:
        """Steps of the run's own branch that are committed, in increasing order."""
        return tuple(sorted(entry.step for entry in self._steps_now().live))

    def latest_step(self) -> int | None:
        """The newest committed step of the run's own branch."""
        return max(self.all_steps(), default=None)

    def best_step(self, metric: str | None = None, mode: Literal["min", "max"] | None = None) -> int | None:
        """The committed step with the best value of a metric, by default the one that the spec names."""
        selector = self._with_mode(BestStep(metric, mode) if metric else BestStep(self._metric_of_spec(), mode))
        try:
            return recovery.order(self._steps_now(), selector)[0].step
        except StepNotFoundError:
            return None

    def _metric_of_spec(self) -> str:
        named = [part.metric for part in _parts(self.spec) if hasattr(part, "mode")]
        if not named:
            raise SpecError(
                what="the spec names no metric.",
                why="without one there is no best step.",
                fix='ckpt.best_step("val_loss", mode="min")',
            )
        return str(named[0])

    def _with_mode(self, selector: BestStep) -> BestStep:
        if selector.mode:
            return selector
        for part in _parts(self.spec):
            if getattr(part, "metric", None) == selector.metric and hasattr(part, "mode"):
                return BestStep(selector.metric, part.mode)
        raise SpecError(
            what=f"it is not known whether a small or a large {selector.metric!r} is better.",
            why="the spec does not name this metric, and guessing would choose the worst step.",
            fix=f'ct.best({selector.metric!r}, mode="min")',
        )

    def pin(self, step: int, *, pinned: bool = True) -> None:
        """Protect a committed step from retention, or with `pinned=False` no longer."""
        if pinned and step not in {entry.step for entry in self._steps_now().committed}:
            raise StepNotFoundError(
                what=f"there is no committed step {step} to pin.",
                fix=f"there are {', '.join(map(str, self.all_steps())) or 'no steps'}.",
            )
        pins = catalogue.read_pins(self.directory)
        catalogue.write_pins(self.directory, pins | {step} if pinned else pins - {step})
        self._catalogue = catalogue.scan(self.directory)

    # Restore

    def restore(self, state: Mapping[str, Any], step: Selector = "latest") -> RestoreReport:
        """Restore a step into `state`, passing over damaged ones.

        Args:
            state: Items by name. Live objects are filled in place; the rest is in the report's `state`. Items may be
                left out, and abstract ones (`nnx.eval_shape`) are accepted.
            step: "latest", a number, or `ct.best(metric)`.

        Returns:
            What was restored and what was passed over; `.step` is None in an empty directory.

        Raises:
            NoIntactStepError: If there are steps and none is intact.
            StructureError: If the step does not fit `state`; nothing was changed.
            StepNotFoundError: If `step` is not there.
            StorageError: If the disk does not answer.
        """
        began = time.monotonic()
        require_items(state)
        self.wait()
        if isinstance(step, BestStep):
            step = self._with_mode(step)
        self._catalogue = catalogue.scan(self.directory)
        candidates = recovery.order(self._catalogue, step)
        if isinstance(step, int) and candidates[0].error:
            raise candidates[0].error
        loaded, tried = recovery.load_first_intact(
            candidates, state, check=lambda _loaded: None, quarantine_in=self._quarantine_in()
        )
        report = RestoreReport(step=None, state=dict(state), candidates=tuple(tried))
        if loaded is None:
            if any(candidate.verdict != "empty" for candidate in tried):
                raise recovery.no_intact_step(report, self.directory)
            self._begin(0, (), None, 0.0)
            return report
        filled = recovery.place_on_device(loaded, state)
        summary = loaded.manifest.summary
        self._begin(summary.step, summary.lineage, loaded.manifest.contents.triggers, summary.run_s)
        return dataclasses.replace(
            report,
            step=summary.step,
            state=filled,
            metrics=dict(summary.metrics),
            seconds=time.monotonic() - began,
        )

    def _quarantine_in(self) -> pathlib.Path | None:
        """The run's folder if nobody else writes to it: a reader must not move a writer's steps."""
        try:
            self._lock.acquire()
        except StorageError:
            return None
        return self.directory

    def _begin(self, step: int, lineage: manifest.Lineage, memory: Any, run_s: float) -> None:
        """Go on from a restored step, or from nothing."""
        self._catalogue = catalogue.scan(self.directory)
        newest = self._catalogue.newest
        if newest is None or newest.manifest is None:
            self._lineage = ((secrets.token_hex(4), 0),)
        elif newest.step == step and newest.manifest.summary.lineage == lineage:
            self._lineage = lineage
        else:
            # An older step: what comes now is a branch, and what came after that step is superseded by its first save.
            self._lineage = (*lineage, (secrets.token_hex(4), step))
        self._restored, self._position, self._memory = True, step, memory
        self._run_s_before, self._started_at = run_s, time.monotonic()

    # Train

    def steps(self, total: int) -> Iterator[int]:
        """The steps that are left: from the one after the restored step to `total`.

        Ends early, with that step saved, when the process was asked to stop.

        Raises:
            NotRestoredError: If the directory is in use and `restore` was not called.
        """
        self._require_restored()
        if type(total) is not int or total < 0:
            raise StepOrderError(what=f"steps({total!r}) is no number of steps.", fix="steps(10_000)")
        return self._count(total)

    def _count(self, total: int) -> Iterator[int]:
        self._final_step = total
        self._stop.listen()
        for step in range(self._position + 1, total + 1):
            yield step
            if self._position < step and step == total:
                warnings.warn(
                    f"the final step {total} was not passed to step(), so it is not saved. Call ckpt.step(step, state) "
                    "at the end of every step; it saves only when the spec says so.",
                    CheckpointWarning,
                    stacklevel=2,
                )
            if self._left:
                return

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
        """
        return self._guarded(step, on_error, lambda: self._step(step, state, metrics or {}))

    def save(
        self,
        step: int,
        state: Mapping[str, Any],
        metrics: Mapping[str, Any] | None = None,
        *,
        reason: str = "asked for",
        on_error: OnError = "raise",
    ) -> Outcome:
        """Save now, whatever the triggers say."""

        def run() -> Outcome:
            self._require_restored()
            finished = self._collect()
            return self._save(self._moment(step, metrics or {}), state, metrics or {}, reason, finished)

        return self._guarded(step, on_error, run)

    def wait(self) -> Saved | None:
        """Wait until the save in progress is on the disk, and raise its error.

        Raises:
            SaveTimeoutError: After `storage.timeout_s`; the save goes on and is asked about again by the next call.
        """
        worker = self._worker
        if worker is None:
            return None
        if not worker.wait(self.spec.storage.timeout_s):
            raise SaveTimeoutError(
                what=f"the save of step {worker.step} has not ended after {self.spec.storage.timeout_s:g} s.",
                why="the disk is slow, full or gone; that step is not committed.",
                fix="look at the disk; Storage(timeout_s=...) sets how long to wait.",
            )
        return self._collect()

    def _guarded(self, step: int, on_error: OnError, call: Callable[[], Outcome]) -> Outcome:
        try:
            return call()
        except CheckpointError as error:
            if on_error == "return":
                return Failed(step=step, error=error)
            raise

    def _step(self, step: int, state: Mapping[str, Any], metrics: Mapping[str, Any]) -> Outcome:
        self._require_restored()
        self._stop.listen()
        finished = self._collect()
        moment = self._moment(step, metrics)
        self._memory = self.spec.save.observe(moment, self._memory)
        decision = self.spec.save.decide(moment, self._memory)
        if self.preempted:
            reason = f"{self._stop.received.name if self._stop.received else 'a signal'} asked to stop"
        elif step == self._final_step:
            reason = "the final step"
        elif decision.save:
            reason = decision.reason
        else:
            self._position = max(self._position, step)
            return Skipped(step=step, reason=f"not due: {decision.reason}", finished=finished)
        must_last = self.preempted or step == self._final_step
        outcome = self._save(moment, state, metrics, reason, finished, blocking=must_last)
        self._left = self._left or self.preempted
        return outcome

    def _moment(self, step: int, metrics: Mapping[str, Any]) -> Moment:
        if type(step) is not int or step < 1 or step < self._position:
            raise StepOrderError(
                what=f"step {step!r} cannot come after step {self._position}.",
                why="a step counts completed updates, so it only grows.",
                fix="to go back, restore(state, step=...) an earlier step; that begins a branch.",
            )

        def metric(name: str) -> float | None:
            return _as_float(name, metrics[name]) if name in metrics else None

        return Moment(step=step, run_s=self._run_s_before + time.monotonic() - self._started_at, metric=metric)

    def _save(
        self,
        moment: Moment,
        state: Mapping[str, Any],
        metrics: Mapping[str, Any],
        reason: str,
        finished: Saved | None,
        *,
        blocking: bool = False,
    ) -> Outcome:
        began = time.monotonic()
        require_items(state)
        self._lock.acquire()
        finished = self.wait() or finished
        live = {entry.step: entry for entry in self._catalogue.live}
        if moment.step in live and self._position == moment.step:
            return Skipped(step=moment.step, reason="this step is saved already", finished=finished)
        asynchronous = self.spec.storage.asynchronous and not blocking
        job = self._job(moment, state, metrics, reason, self._buffers if asynchronous else None)
        self._make_room(saving.estimate_bytes(job.snapshot))
        self._worker = _Worker(moment.step, lambda worker: self._run(job, began, worker))
        self._position, self._memory = moment.step, job.triggers
        self._worker.stall_s = time.monotonic() - began
        if asynchronous:
            return Started(step=moment.step, reason=reason, stall_s=self._worker.stall_s, finished=finished)
        saved = self.wait()
        if saved is None:
            raise StorageError(what=f"the save of step {moment.step} ended without a result.")
        return dataclasses.replace(saved, stall_s=saved.seconds)

    def _job(
        self,
        moment: Moment,
        state: Mapping[str, Any],
        metrics: Mapping[str, Any],
        reason: str,
        buffers: snapshot.Buffers | None,
    ) -> saving.Job:
        summary = manifest.Summary(
            step=moment.step,
            sequence=self._catalogue.next_sequence,
            saved_at=time.time(),
            run_s=moment.run_s,
            metrics={name: _as_float(name, value) for name, value in metrics.items()},
            lineage=self._lineage,
            reason=reason,
            spec=self.spec.fingerprint(),
            files={},
        )
        return saving.Job(
            snapshot=snapshot.take(state, buffers),
            summary=summary,
            triggers=self.spec.save.saved(moment, self._memory),
            outputs=None,
        )

    def _run(self, job: saving.Job, began: float, worker: "_Worker") -> Saved:
        """The part of a save that may run in the background: write, commit, and only then delete."""
        path = saving.write_step(self.directory, self.spec, job, abandoned=worker.abandoned.is_set)
        self._catalogue = catalogue.scan(self.directory)
        deleted = self._prune()
        return Saved(
            step=job.summary.step,
            path=path,
            total_bytes=sum(file.stat().st_size for file in path.rglob("*") if file.is_file()),
            seconds=time.monotonic() - began,
            stall_s=worker.stall_s,
            reason=job.summary.reason,
            deleted=deleted,
        )

    def _prune(self) -> tuple[int, ...]:
        deleted = []
        by_sequence = {entry.info.sequence: entry for entry in self._catalogue.committed if entry.info}
        newest = max(by_sequence, default=None)
        infos = [entry.info for entry in by_sequence.values() if entry.info]
        for verdict in retention.decide(self.spec.keep, infos, newest_verified=newest):
            if not verdict.keep:
                commit.discard(self.directory, by_sequence[verdict.step.sequence].path)
                deleted.append(verdict.step.step)
        if deleted:
            self._catalogue = catalogue.scan(self.directory)
        return tuple(deleted)

    def _make_room(self, save_bytes: int) -> None:
        if self.spec.storage.when_full == "prune":
            try:
                saving.require_space(self.directory, self.spec, save_bytes)
            except StorageError:
                self._prune()
        saving.require_space(self.directory, self.spec, save_bytes)

    def _collect(self) -> Saved | None:
        """The result of a background save that has ended; raises its error, once."""
        worker = self._worker
        if worker is None or not worker.ended:
            return None
        self._worker = None
        return worker.result()

    def _require_restored(self) -> None:
        if self._restored:
            return
        if not self._catalogue.entries:
            self._begin(0, (), None, 0.0)
            return
        raise NotRestoredError(
            what=f"{self.directory} holds steps and none was restored.",
            why="training from the start would supersede the run that is there.",
            fix="report = ckpt.restore(state) before the loop, or another directory for a new run.",
        )


class _Worker:
    """One save in a thread of its own."""

    def __init__(self, step: int, run: Callable[["_Worker"], Saved]) -> None:
        self.step = step
        self.stall_s = 0.0
        self.abandoned = threading.Event()
        self._outcome: Saved | BaseException | None = None
        self._thread = threading.Thread(target=self._work, args=(run,), name=f"ckpttools-save-{step}", daemon=True)
        self._thread.start()

    def _work(self, run: Callable[["_Worker"], Saved]) -> None:
        try:
            self._outcome = run(self)
        except BaseException as error:
            self._outcome = error

    @property
    def ended(self) -> bool:
        return not self._thread.is_alive()

    def wait(self, timeout_s: float) -> bool:
        self._thread.join(timeout_s)
        return self.ended

    def result(self) -> Saved | None:
        if isinstance(self._outcome, BaseException):
            raise self._outcome
        return self._outcome


def require_items(state: Mapping[str, Any]) -> None:
    """Raise `LeafError` unless the state is a mapping of names that can be folders."""
    if not isinstance(state, Mapping):
        raise LeafError(
            what=f"the state is a {type(state).__name__}.",
            why="items are stored by name, so that single ones can be restored.",
            fix='{"model": model, "optimizer": optimizer}',
        )
    for name in state:
        legal = isinstance(name, str) and name.isidentifier() and name.isascii() and name not in _RESERVED_ITEMS
        if not legal:
            raise LeafError(
                what=f"an item of the state is named {name!r}.",
                why="the name becomes a folder of the step, beside the files of Orbax.",
                fix='a plain word such as "model".',
            )


_RESERVED_ITEMS = frozenset({"metrics", "default", "descriptor"})
"""Names that Orbax gives a meaning of its own."""


def _parts(spec: CheckpointSpec) -> list[Any]:
    """All triggers and retention values of a spec, combinations taken apart."""

    def open_up(value: Any) -> list[Any]:
        return [inner for part in value.parts for inner in open_up(part)] if hasattr(value, "parts") else [value]

    return [*open_up(spec.keep), *open_up(spec.save)]


def _as_float(name: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise LeafError(
            what=f"the metric {name!r} is {value!r:.80}.",
            why="metrics are compared, so each must be a number.",
            fix=f"{{{name!r}: float(loss)}}",
        ) from error
