# SPDX-License-Identifier: Apache-2.0
"""What a session holds while a run is open: the run directory and its lock, the other processes, and the mirror."""

import os
import pathlib
from typing import Literal

from ..errors import CheckpointError, SpecError, StepNotFoundError
from ..mirror.upload import MirrorUploader
from ..processes import agreement, messages
from ..restore import select
from ..restore.select import BestStep
from ..restore.validation import Validate
from ..spec.mirror import as_mirror
from ..spec.spec import CheckpointSpec
from ..store.run_directory import RunDirectory
from .advice import warn
from .call_guard import CallGuard


class RunResources:
    """An open run.

    Args:
        spec: The run's spec.
        validate: Its validation function, if it has one.

    Attributes:
        spec: The run's spec.
        directory: The run's directory, absolute.
        validate: Its validation function, if it has one.
        run: The steps in it, and the writer's lock.
        group: The processes of the run.
        uploader: Copies committed steps to the mirror; None if the spec has none.
        guard: Lets one call at a time into the session.
    """

    def __init__(self, spec: CheckpointSpec, validate: Validate | None) -> None:
        if not isinstance(spec, CheckpointSpec):
            raise SpecError(
                what=f"a run is opened by a CheckpointSpec, not by {spec!r:.200}.",
                why="the spec says when to save and what to keep, not only where.",
                fix='ct.open(ct.CheckpointSpec(directory="runs/a", save=ct.EverySteps(500)))',
            )
        self.spec = spec
        self.directory = pathlib.Path(os.path.realpath(spec.directory))
        self.validate = validate
        self.run = RunDirectory(self.directory)
        self.group = messages.make_group(spec.storage.timeout_s)
        try:
            agreement.open_run(self.group, self.run, spec, has_validation=validate is not None)
        except CheckpointError:
            self.group.close()
            raise
        mirror = as_mirror(spec.mirror)
        self.uploader = None if mirror is None else MirrorUploader(self.directory, mirror, spec.keep)
        self.guard = CallGuard(spec.storage.timeout_s)

    def list_steps(self) -> tuple[int, ...]:
        """Return the committed steps of the run's current branch, in increasing order."""
        return tuple(sorted(entry.step for entry in self.run.refresh_steps().live_entries))

    def find_best_step(self, metric: str | None, mode: Literal["min", "max"] | None) -> int | None:
        """Return the committed step with the best value of a metric, by default the one that the spec names."""
        selector = BestStep(metric, mode) if metric else select.make_best_selector(self.spec)
        try:
            return select.list_candidates(self.run.refresh_steps(), select.resolve_mode(self.spec, selector))[0].step
        except StepNotFoundError:
            return None

    def pin(self, step: int, *, pinned: bool) -> None:
        """Protect a committed step from retention, or stop protecting it."""
        self.group.broadcast(f"the pin of step {step}", lambda: self.run.pin(step, pinned=pinned))

    def delete(self, step: int) -> None:
        """Delete a committed step, whatever the spec keeps."""
        self.group.broadcast(f"the deletion of step {step}", lambda: self._delete(step))

    def _delete(self, step: int) -> None:
        with self.run.hold_for_writing():
            self.run.delete(step)

    def update_mirror(self) -> None:
        """Copy the steps that the mirror lacks, in the background."""
        if self.uploader is not None:
            self.uploader.update(self.run.get_steps())

    def warn_of_mirror(self) -> None:
        """Warn of what went wrong at the mirror since the last call."""
        for note in self.uploader.take_notes() if self.uploader is not None else ():
            warn(note)

    def close_mirror(self) -> None:
        """Wait for the copies in progress."""
        if self.uploader is not None:
            self.uploader.close()
            self.warn_of_mirror()
