# SPDX-License-Identifier: Apache-2.0
"""The saves of a session: one at a time, each in a thread, its result or error fetched once."""

import secrets
import time
from collections.abc import Callable, Mapping
from typing import Any

from ..mirror.upload import Copier
from ..processes.group import Group
from ..restore import validation
from ..save import multiprocess_save, write_step
from ..save.outcomes import Saved
from ..save.worker import Worker
from ..spec.spec import CheckpointSpec
from ..spec.trigger_memory import written
from ..spec.triggers import Moment
from ..store import manifest
from ..store.run_directory import RunFolder
from ..tree import snapshot
from ..tree.items import as_metric
from .progress import Course


class Saver:
    """Starts the saves of one session and waits for them.

    Args:
        spec: The session's spec.
        run: Its folder.
        group: Its processes.
        copier: Of its mirror, if it has one.
        validate: Its validation function, if it has one.
        course: Where it stands; told of each save.

    Attributes:
        worker: The save in progress, or one that has ended and whose result nobody has fetched; None without.
        buffers: Host memory that copies are put into, kept from one save to the next.
    """

    def __init__(
        self,
        *,
        spec: CheckpointSpec,
        run: RunFolder,
        group: Group,
        copier: Copier | None,
        validate: validation.Validate | None,
        course: Course,
    ) -> None:
        self.worker: Worker | None = None
        self.buffers: snapshot.Buffers = {}
        self._spec = spec
        self._run = run
        self._group = group
        self._copier = copier
        self._validate = validate
        self._course = course

    @property
    def ended(self) -> bool:
        """Whether there is a save whose result can be fetched."""
        return self.worker is not None and self.worker.ended

    @property
    def failure(self) -> BaseException | None:
        """The error of a save that has ended, before it is fetched."""
        return self.worker.error if self.worker is not None and self.worker.ended else None

    def begin(
        self,
        moment: Moment,
        state: Mapping[str, Any],
        metrics: Mapping[str, Any],
        *,
        reason: str,
        began: float,
        asynchronous: bool,
    ) -> Worker | None:
        """Take the state and save it in a thread; the save before it must have been waited for.

        Args:
            moment: The step.
            state: Items by name.
            metrics: To be recorded.
            reason: To be recorded.
            began: `time.monotonic()` when the save was asked for.
            asynchronous: Whether the live arrays may change before the save has ended, so that copies are saved.

        Returns:
            The save in progress; None if the step is saved already.
        """
        topic = f"the save of step {moment.step}"
        staging = self._group.decide(topic, lambda: self._staging(moment.step))
        if staging is None:
            return None
        buffers = self.buffers if asynchronous else None
        job = self._group.together(topic, lambda: self._job(moment, state, metrics, reason, buffers, staging))
        self._group.decide(topic, lambda: write_step.make_room(self._run, self._spec, job))
        self.worker = Worker(moment.step, lambda worker: self._write(job, worker, began))
        self._course.saving(moment)
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
            return worker.result()
        except Exception:
            self._course.save_failed()
            raise

    def at_end(self, call: Callable[[], None]) -> None:
        """Call once no save is in progress any more; at once if there is none."""
        if self.worker is None:
            call()
        else:
            self.worker.at_end(call)

    def _staging(self, step: int) -> str | None:
        """The name of a new staging folder; None if the step is saved already."""
        return None if self._run.holds(step, self._course.lineage) else f"{step}-{secrets.token_hex(4)}"

    def _job(
        self,
        moment: Moment,
        state: Mapping[str, Any],
        metrics: Mapping[str, Any],
        reason: str,
        buffers: snapshot.Buffers | None,
        staging: str,
    ) -> write_step.Job:
        summary = manifest.Summary(
            step=moment.step,
            sequence=self._run.steps().next_sequence,
            saved_at=time.time(),
            run_s=moment.run_s,
            metrics={name: as_metric(name, value) for name, value in metrics.items()},
            lineage=self._course.lineage,
            reason=reason,
            spec=self._spec.fingerprint(),
            files={},
        )
        outputs = validation.outputs_of(self._validate, state, step=moment.step) if self._validate else None
        return write_step.Job(
            snapshot=snapshot.take(state, buffers),
            summary=summary,
            triggers=written(self._spec.save, self._course.memory_after(moment)),
            outputs=outputs,
            surgery=self._course.surgery,
            staging=staging,
        )

    def _write(self, job: write_step.Job, worker: Worker, began: float) -> Saved:
        if self._group.count > 1:
            return multiprocess_save.run(self._run, self._spec, job, worker, began, self._group)
        saved = write_step.run(self._run, self._spec, job, worker, began)
        if self._copier is not None:
            self._copier.update(self._run.steps())
        return saved
