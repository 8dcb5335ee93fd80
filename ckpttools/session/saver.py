# SPDX-License-Identifier: Apache-2.0
"""The saves of a session: one at a time, each in a thread, whose result or error is fetched once."""

import atexit
import dataclasses
import secrets
import time
from collections.abc import Callable, Mapping
from typing import Any

from ..errors import StorageError
from ..restore import validation
from ..save import multiprocess_save, write_step
from ..save.outcomes import Outcome, Saved, Skipped, Started
from ..save.worker import Worker
from ..spec.exclude import as_rules
from ..spec.trigger_memory import encode_memory
from ..spec.triggers import StepContext
from ..store import manifest
from ..tree import snapshot
from ..tree.items import as_metric, require_items
from .advice import StallMeter, warn
from .progress import RunProgress
from .resources import RunResources


class Saver:
    """Start the saves of one session and wait for them.

    Args:
        resources: The open run.
        progress: Where the run stands; updated by each save.
        close: Closes the session; called at exit if a background save is still in progress then.

    Attributes:
        worker: The save in progress, or one that has ended and whose result was not fetched; None without.
        buffers: Host memory that background saves copy arrays into, reused by the next save.
    """

    def __init__(self, resources: RunResources, progress: RunProgress, close: Callable[[], None]) -> None:
        self.worker: Worker | None = None
        self.buffers: snapshot.Buffers = {}
        self._resources = resources
        self._spec = resources.spec
        self._progress = progress
        self._close_session = close
        self._stall_meter = StallMeter()

    @property
    def has_ended(self) -> bool:
        """Whether there is a save whose result can be fetched."""
        return self.worker is not None and self.worker.has_ended

    @property
    def failure(self) -> BaseException | None:
        """The error of a save that has ended, before it is fetched."""
        return self.worker.error if self.worker is not None and self.worker.has_ended else None

    def save(
        self,
        context: StepContext,
        state: Mapping[str, Any],
        metrics: Mapping[str, Any],
        *,
        reason: str,
        finished: Saved | None,
        blocking: bool = False,
    ) -> Outcome:
        """Save a step, in the background if the spec says so.

        Args:
            context: The step.
            state: Items by name.
            metrics: Recorded with the step.
            reason: Recorded with the step.
            finished: An earlier background save whose result was fetched by this call.
            blocking: Whether to wait for the commit, whatever the spec says.
        """
        start_time = time.monotonic()
        require_items(state)
        finished = self.wait() or finished
        is_background = self._spec.storage.asynchronous and not blocking
        worker = self._start(context, state, metrics, reason, start_time, is_background=is_background)
        if worker is None:
            return Skipped(step=context.step, reason="this step is saved already", finished=finished)
        if is_background:
            # A program that ends without `close` would lose this save silently.
            atexit.unregister(self._close_session)
            atexit.register(self._close_session)
            stall_s = worker.stall_s = time.monotonic() - start_time
            warn(self._stall_meter.add(now_s=time.monotonic(), step=context.step, stall_s=stall_s))
            return Started(step=context.step, reason=reason, stall_s=stall_s, finished=finished)
        saved = self._wait_for(worker)
        stall_s = time.monotonic() - start_time
        if not blocking:
            warn(self._stall_meter.add(now_s=time.monotonic(), step=worker.step, stall_s=stall_s))
        return dataclasses.replace(saved, stall_s=stall_s)

    def _start(
        self,
        context: StepContext,
        state: Mapping[str, Any],
        metrics: Mapping[str, Any],
        reason: str,
        start_time: float,
        *,
        is_background: bool,
    ) -> Worker | None:
        """Take a snapshot and start to write it in a thread; None if the step is saved already."""
        topic, group = f"the save of step {context.step}", self._resources.group
        staging = group.broadcast(topic, lambda: self._make_staging_name(context.step))
        if staging is None:
            return None
        # A background save needs copies, since the live arrays may change before it has ended.
        buffers = self.buffers if is_background else None
        job = group.run_on_all(topic, lambda: self._make_job(context, state, metrics, reason, buffers, staging))
        group.broadcast(topic, lambda: write_step.make_room(self._resources.run, self._spec, job))
        self.worker = Worker(context.step, lambda worker: self._run_job(job, worker, start_time))
        self._progress.begin_save(context)
        return self.worker

    def wait(self) -> Saved | None:
        """Wait for the save in progress; return its result or raise its error, once.

        Raises:
            SaveTimeoutError: After `storage.timeout_s`.
        """
        worker = self.worker
        if worker is None:
            return None
        worker.wait(self._spec.storage.timeout_s)
        self.worker = None
        try:
            saved = worker.get_result()
        except Exception:
            self._progress.revert_save()
            raise
        if saved is not None:
            warn(saved.trouble)
        return saved

    def _wait_for(self, worker: Worker) -> Saved:
        """Wait for a save that works on the live arrays, not on copies."""
        try:
            saved = self.wait()
        except BaseException:
            # Once the program continues, the arrays may change, so this save must not be committed.
            worker.is_abandoned.set()
            raise
        if saved is None:
            raise StorageError(
                what=f"the save of step {worker.step} ended without a result.",
                why="the thread that wrote it ended before the commit, so the step was not saved.",
                fix="save again; `ckpt.latest_step()` returns the newest committed step.",
            )
        return saved

    def close(self) -> None:
        """Release the run's lock and the buffers as soon as no save is in progress."""
        atexit.unregister(self._close_session)

        def release() -> None:
            self._resources.run.lock.release()
            self.buffers.clear()

        # A save that did not end in time is still writing; until it has ended, no other process may write.
        if self.worker is None:
            release()
        else:
            self.worker.add_done_callback(release)

    def _make_staging_name(self, step: int) -> str | None:
        """The name of a new staging directory; None if the step is saved already."""
        is_saved = self._resources.run.has_step(step, self._progress.lineage)
        return None if is_saved else f"{step}-{secrets.token_hex(4)}"

    def _make_job(
        self,
        context: StepContext,
        state: Mapping[str, Any],
        metrics: Mapping[str, Any],
        reason: str,
        buffers: snapshot.Buffers | None,
        staging: str,
    ) -> write_step.Job:
        summary = manifest.Summary(
            step=context.step,
            sequence=self._resources.run.get_steps().next_sequence,
            saved_at=time.time(),
            run_s=context.run_s,
            metrics={name: as_metric(name, value) for name, value in metrics.items()},
            lineage=self._progress.lineage,
            reason=reason,
            spec=self._spec.fingerprint(),
            files={},
        )
        validate = self._resources.validate
        outputs = validation.compute_outputs(validate, state, step=context.step) if validate else None
        return write_step.Job(
            snapshot=snapshot.take(state, buffers, as_rules(self._spec.exclude)),
            summary=summary,
            triggers=encode_memory(self._spec.save, self._progress.compute_memory(context)),
            outputs=outputs,
            surgery=self._progress.surgery,
            staging=staging,
        )

    def _run_job(self, job: write_step.Job, worker: Worker, start_time: float) -> Saved:
        run, group = self._resources.run, self._resources.group
        if group.count > 1:
            return multiprocess_save.save_step(run, self._spec, job, worker, start_time, group)
        saved = write_step.save_step(run, self._spec, job, worker, start_time)
        self._resources.update_mirror()
        return saved
