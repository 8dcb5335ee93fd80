# SPDX-License-Identifier: Apache-2.0
"""The saves of a session: one at a time, each in a thread, whose result or error is fetched once.

The calling thread may be interrupted at any bytecode. So a save is registered before its thread starts and stays
registered until it has ended; meanwhile nothing touches the buffers that it reads, and the lock is held.
"""

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
from ..spec.state import as_rules
from ..spec.trigger_memory import encode_memory
from ..spec.triggers import StepContext
from ..store import manifest
from ..tree import snapshot
from ..tree.items import require_items
from .advice import StallMeter, warn
from .call_guard import Call
from .progress import RunProgress, read_metric
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
        self._waiting_call: Call | None = None
        self._finished: tuple[Worker | None, Saved | None] = (None, None)

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
        blocking: bool = False,
    ) -> Outcome:
        """Save a step, in the background if the spec says so.

        Args:
            context: The step.
            state: Items by name.
            metrics: Recorded with the step.
            reason: Recorded with the step.
            blocking: Whether to wait for the commit, whatever the spec says.
        """
        start_time = time.monotonic()
        require_items(state)
        self.wait()
        is_background = self._spec.storage.asynchronous and not blocking
        worker = self._start(context, state, metrics, reason, start_time, is_background=is_background)
        if worker is None:
            finished = self.take_finished()
            return Skipped(step=context.step, reason="this step is saved already", finished=finished)
        if is_background:
            # A program that ends without `close` would lose this save silently.
            atexit.unregister(self._close_session)
            atexit.register(self._close_session)
            stall_s = worker.stall_s = time.monotonic() - start_time
            warn(self._stall_meter.add(now_s=time.monotonic(), step=context.step, stall_s=stall_s))
            return Started(step=context.step, reason=reason, stall_s=stall_s, finished=self.take_finished())
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
        self._waiting_call = self._resources.guard.current_call
        self.worker = worker = Worker(
            context.step,
            lambda worker: self._run_job(job, worker, start_time),
            asks_before_commit=not is_background,
            timeout_s=self._spec.storage.timeout_s,
        )
        self._progress.begin_save(context, worker)
        worker.start()
        return worker

    def wait(self) -> None:
        """Wait for the save in progress, and raise its error; `take_finished` returns its result.

        Raises:
            SaveTimeoutError: After `storage.timeout_s`.
        """
        worker = self.worker
        if worker is None:
            return
        self.leave_interrupted()
        worker.wait(self._spec.storage.timeout_s)
        try:
            saved = worker.get_result()
        except Exception as error:
            self._progress.revert_save(worker)
            self.worker = None
            if not worker.was_left:
                raise
            # Its caller has already seen an error: the interrupt.
            warn(f"step {worker.step} is not saved: {error}")
            return
        if saved is None:
            self._progress.revert_save(worker)
            self.worker = None
            warn(f"step {worker.step} is not saved: the call was interrupted before the save began.")
            return
        self._progress.record_saved(saved.step)
        if self._finished[0] is not worker:
            self._finished = worker, dataclasses.replace(saved, finished=self._finished[1])
        self.worker = None
        warn(saved.trouble)

    def leave_interrupted(self) -> None:
        """Prevent the commit of a save that reads the live arrays of an interrupted call."""
        if self.worker is not None and self._resources.guard.current_call is not self._waiting_call:
            self.worker.leave()

    def take_finished(self) -> Saved | None:
        """Return the save that has ended since the last call of this method; an earlier one is in its `finished`."""
        worker, saved = self._finished
        self._finished = worker, None
        return saved

    def _wait_for(self, worker: Worker) -> Saved:
        """Wait for a save that works on the live arrays, not on copies."""
        try:
            self.wait()
        except BaseException:
            worker.leave()
            raise
        saved = self.take_finished()
        if saved is None or saved.step != worker.step:
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
        worker = self.worker
        if worker is None:
            release()
        else:
            worker.cancel()
            worker.add_done_callback(release)

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
            metrics={name: read_metric(name, value) for name, value in metrics.items()},
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
