# SPDX-License-Identifier: Apache-2.0
"""The saves of a session: one at a time, each in a thread, its result or error fetched once."""

import secrets
import time
from collections.abc import Callable, Mapping
from typing import Any

from ..mirror.upload import MirrorUploader
from ..processes.group import Group
from ..restore import validation
from ..save import multiprocess_save, write_step
from ..save.outcomes import Saved
from ..save.worker import Worker
from ..spec.spec import CheckpointSpec
from ..spec.trigger_memory import encode_memory
from ..spec.triggers import StepContext
from ..store import manifest
from ..store.run_directory import RunDirectory
from ..tree import snapshot
from ..tree.items import as_metric
from .progress import RunProgress


class Saver:
    """Starts the saves of one session and waits for them.

    Args:
        spec: The session's spec.
        run: Its folder.
        group: Its processes.
        uploader: Of its mirror, if it has one.
        validate: Its validation function, if it has one.
        run_progress: Where it stands; told of each save.

    Attributes:
        worker: The save in progress, or one that has ended and whose result nobody has fetched; None without.
        buffers: Host memory that copies are put into, kept from one save to the next.
    """

    def __init__(
        self,
        *,
        spec: CheckpointSpec,
        run: RunDirectory,
        group: Group,
        uploader: MirrorUploader | None,
        validate: validation.Validate | None,
        run_progress: RunProgress,
    ) -> None:
        self.worker: Worker | None = None
        self.buffers: snapshot.Buffers = {}
        self._spec = spec
        self._run = run
        self._group = group
        self._uploader = uploader
        self._validate = validate
        self._run_progress = run_progress

    @property
    def has_ended(self) -> bool:
        """Whether there is a save whose result can be fetched."""
        return self.worker is not None and self.worker.has_ended

    @property
    def failure(self) -> BaseException | None:
        """The error of a save that has ended, before it is fetched."""
        return self.worker.error if self.worker is not None and self.worker.has_ended else None

    def begin(
        self,
        context: StepContext,
        state: Mapping[str, Any],
        metrics: Mapping[str, Any],
        *,
        reason: str,
        start_time: float,
        asynchronous: bool,
    ) -> Worker | None:
        """Take the state and save it in a thread; the save before it must have been waited for.

        Args:
            context: The step.
            state: Items by name.
            metrics: To be recorded.
            reason: To be recorded.
            start_time: `time.monotonic()` when the save was asked for.
            asynchronous: Whether the live arrays may change before the save has ended, so that copies are saved.

        Returns:
            The save in progress; None if the step is saved already.
        """
        topic = f"the save of step {context.step}"
        staging = self._group.broadcast(topic, lambda: self._make_staging_name(context.step))
        if staging is None:
            return None
        buffers = self.buffers if asynchronous else None
        job = self._group.run_on_all(topic, lambda: self._make_job(context, state, metrics, reason, buffers, staging))
        self._group.broadcast(topic, lambda: write_step.make_room(self._run, self._spec, job))
        self.worker = Worker(context.step, lambda worker: self._run_job(job, worker, start_time))
        self._run_progress.begin_save(context)
        return self.worker

    def wait(self) -> Saved | None:
        """Wait for the save in progress; its result or its error is handed out once.

        Raises:
            SaveTimeoutError: After `storage.timeout_s`.
        """
        worker = self.worker
        if worker is None:
            return None
        worker.wait(self._spec.storage.timeout_s)
        self.worker = None
        try:
            return worker.get_result()
        except Exception:
            self._run_progress.revert_save()
            raise

    def add_done_callback(self, callback: Callable[[], None]) -> None:
        """Call once no save is in progress any more; at once if there is none."""
        if self.worker is None:
            callback()
        else:
            self.worker.add_done_callback(callback)

    def _make_staging_name(self, step: int) -> str | None:
        """The name of a new staging folder; None if the step is saved already."""
        return None if self._run.has_step(step, self._run_progress.lineage) else f"{step}-{secrets.token_hex(4)}"

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
            sequence=self._run.get_steps().next_sequence,
            saved_at=time.time(),
            run_s=context.run_s,
            metrics={name: as_metric(name, value) for name, value in metrics.items()},
            lineage=self._run_progress.lineage,
            reason=reason,
            spec=self._spec.fingerprint(),
            files={},
        )
        outputs = validation.compute_outputs(self._validate, state, step=context.step) if self._validate else None
        return write_step.Job(
            snapshot=snapshot.take(state, buffers),
            summary=summary,
            triggers=encode_memory(self._spec.save, self._run_progress.compute_memory(context)),
            outputs=outputs,
            surgery=self._run_progress.surgery,
            staging=staging,
        )

    def _run_job(self, job: write_step.Job, worker: Worker, start_time: float) -> Saved:
        if self._group.count > 1:
            return multiprocess_save.save_step(self._run, self._spec, job, worker, start_time, self._group)
        saved = write_step.save_step(self._run, self._spec, job, worker, start_time)
        if self._uploader is not None:
            self._uploader.update(self._run.get_steps())
        return saved
