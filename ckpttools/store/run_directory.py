# SPDX-License-Identifier: Apache-2.0
"""A run's folder as one object: its steps, its pins, its lock, and what retention deletes from it."""

import contextlib
import dataclasses
import os
import pathlib
import secrets
import shutil
from collections.abc import Sequence

from ..errors import StepDamagedError, StepNotFoundError, StepOrderError, StorageError, VersionError
from ..spec import retention
from . import catalogue, commit, layout
from .catalogue import Catalogue, Entry
from .lock import WriterLock
from .manifest import Lineage, read_sealed


def require_run_directory(directory: str | os.PathLike[str]) -> pathlib.Path:
    """The absolute path of a run's folder.

    Raises:
        StorageError: If there is none: a misspelt run must not pass for an intact or an empty one.
    """
    root = pathlib.Path(directory).absolute()
    if not root.is_dir():
        raise StorageError(
            what=f"{root} is no folder.",
            why="a run is a folder with a numbered folder for each step.",
            fix="check the path.",
        )
    return root


class RunDirectory:
    """The steps of one run, as this process knows them.

    The holder of the lock knows every change, since it makes them all; anybody else has to look again.
    """

    def __init__(self, directory: pathlib.Path) -> None:
        self.directory = directory
        self.lock = WriterLock(directory)
        self._steps: Catalogue | None = None

    def is_used(self) -> bool:
        """Whether there is any numbered folder, whole or not; cheaper than `steps`."""
        with commit.wrap_os_errors(f"{self.directory} cannot be listed"):
            if not self.directory.is_dir():
                return False
            with os.scandir(self.directory) as entries:
                return any(layout.parse_step_number(entry.name) is not None for entry in entries)

    def refresh_steps(self) -> Catalogue:
        """The steps at this moment, read again unless this process makes all changes."""
        if not self.lock.is_held:
            self.invalidate()
        return self.get_steps()

    def get_steps(self) -> Catalogue:
        """The steps as they were last read."""
        if self._steps is None:
            self._steps = catalogue.scan(self.directory)
        return self._steps

    def invalidate(self) -> None:
        """Read the folder anew when the steps are next asked for: something in it was moved."""
        self._steps = None

    def lock_for_writing(self) -> None:
        """Take the lock, and then clean up what a killed writer left.

        Raises:
            RunInUseError: If another process holds the lock.
            StorageError: If the folder cannot be written.
        """
        if not self.lock.is_held:
            commit.require_writable(self.directory)
            self.lock.acquire()
            with commit.wrap_os_errors(f"what a killed process left in {self.directory} cannot be removed"):
                commit.sweep(self.directory)
            self.invalidate()

    def quarantine(self, path: pathlib.Path) -> pathlib.Path | None:
        """Move a damaged step out of the way; None if another process writes to the run or the disk cannot be written.

        A reader must not move a writer's steps: one that is being deleted looks damaged, too.
        """
        held = self.lock.is_held
        try:
            self.lock.acquire()
            self.invalidate()
            return commit.quarantine(self.directory, path) if path.exists() else None
        except OSError:
            return None
        finally:
            if not held:
                self.lock.release()

    def add(self, path: pathlib.Path) -> None:
        """Take note of a step that was just committed."""
        if self._steps is not None:
            self._steps = catalogue.add_step(self._steps, path, catalogue.read_pins(self.directory))

    def has_step(self, step: int, lineage: Lineage) -> bool:
        """Whether a lineage has this step already; another branch may have one of the same number."""
        found = (
            entry.manifest.summary
            for entry in self.get_steps().committed_entries
            if entry.step == step and entry.manifest
        )
        return any(catalogue.is_live(summary, lineage) for summary in found)

    def pin(self, step: int, *, pinned: bool) -> None:
        """Protect a committed step from retention, or no longer."""
        committed = {entry.step for entry in self.refresh_steps().committed_entries}
        if type(step) is not int or (pinned and step not in committed):
            raise StepNotFoundError(
                what=f"there is no committed step {step!r} to pin.",
                why="a pin on nothing would protect nothing.",
                fix=f"there are {', '.join(map(str, sorted(committed))) or 'no steps'}.",
            )
        pins = catalogue.read_pins(self.directory)
        with commit.wrap_os_errors(f"the pin of step {step} cannot be written"):
            catalogue.write_pins(self.directory, pins | {step} if pinned else pins - {step})
        self.invalidate()

    def decide_retention(self, keep: retention.Retention) -> list[retention.Verdict]:
        """What a retention value would keep and delete now, with reasons."""
        infos = [entry.info for entry in self.get_steps().committed_entries if entry.info]
        newest = max((info.sequence for info in infos), default=None)
        return retention.decide_retention(keep, infos, newest_verified=newest)

    def prune(self, keep: retention.Retention) -> tuple[int, ...]:
        """Delete what `keep` does not keep; returns the steps."""
        self._invalidate_if_deleted()
        # Not by number: two branches may have the same, nor by sequence: a step that was copied in has that of another.
        unwanted = {id(verdict.step) for verdict in self.decide_retention(keep) if not verdict.keep}
        gone = [entry for entry in self.get_steps().committed_entries if id(entry.info) in unwanted]
        self._remove(gone)
        return tuple(entry.step for entry in gone)

    def list_quarantined(self) -> list[pathlib.Path]:
        """What may be deleted from quarantine, by name.

        A step that was committed after all intact ones stays: its second copies tell which branch the run is on.
        """
        folder = layout.get_control_path(self.directory, "quarantine")
        with commit.wrap_os_errors(f"{folder} cannot be listed"):
            found = sorted(folder.iterdir()) if folder.is_dir() else []
        known = self.refresh_steps()
        newest = max((entry.info.sequence for entry in known.committed_entries if entry.info), default=0)
        return found if known.last_sequence <= newest else []

    def empty_quarantine(self) -> tuple[str, ...]:
        """Delete what may be deleted from quarantine; returns the names."""
        gone = self.list_quarantined()
        for path in gone:
            with commit.wrap_os_errors(f"{path} cannot be deleted"):
                commit.discard(self.directory, path)
        self._remove_spares({layout.parse_step_number(path.name.partition("-")[0]) for path in gone})
        return tuple(path.name for path in gone)

    def _remove_spares(self, steps: set[int | None]) -> None:
        """Delete the second copies of steps that are gone; those of what stands in the run stay."""
        known = self.get_steps()
        committed = {entry.info.sequence for entry in known.committed_entries if entry.info}
        damaged = {entry.step for entry in known.entries if entry.info is None}
        for number in catalogue.list_spares(self.directory):
            spare = layout.get_spare_directory(self.directory, number)
            with contextlib.suppress(StepDamagedError, VersionError, OSError):
                step = read_sealed(spare).summary.step
                if number not in committed and step in steps - damaged:
                    shutil.rmtree(spare)

    def _invalidate_if_deleted(self) -> None:
        """Steps that somebody has deleted by hand must not count as kept."""
        known = self.get_steps()
        if not all(entry.path.exists() for entry in known.committed_entries):
            self.invalidate()

    def _remove(self, entries: Sequence[Entry]) -> None:
        known = self.get_steps()
        self.invalidate()  # Should the disk refuse half way, the folder has to be read again.
        for entry in entries:
            with commit.wrap_os_errors(f"step {entry.step} cannot be deleted"):
                commit.discard(self.directory, entry.path)
            spare = layout.get_spare_directory(self.directory, entry.info.sequence if entry.info else 0)
            shutil.rmtree(spare, ignore_errors=True)
        paths = {entry.path for entry in entries}
        self._steps = dataclasses.replace(
            known,
            entries=tuple(entry for entry in known.entries if entry.path not in paths),
            moved_entries=tuple(entry for entry in known.moved_entries if entry.path not in paths),
        )

    def delete(self, step: int) -> None:
        """Delete one committed step of the run's own branch, whatever the retention says; never the newest.

        Raises:
            StepNotFoundError: If there is no such step.
            StepOrderError: If it is the newest.
        """
        known = self.get_steps()
        entry = next((entry for entry in known.live_entries if entry.step == step), None)
        if entry is None:
            raise StepNotFoundError(
                what=f"there is no committed step {step} to delete.",
                why="it was never saved, or retention has deleted it.",
                fix=f"there are {', '.join(str(entry.step) for entry in known.live_entries) or 'no steps'}.",
            )
        if entry is known.newest_entry:
            raise StepOrderError(
                what=f"step {step} is the newest and was not deleted.",
                why="it is what a restart goes on from.",
                fix="save the next step first.",
            )
        self._remove([entry])

    def derive_lineage(self, step: int, lineage: Lineage) -> Lineage:
        """The lineage of what follows a restored step: its own branch, or a new one if the run went on from there.

        A branch supersedes the later steps with its first save, not before: looking back is no decision.
        """
        newest = self.get_steps().newest_entry
        if newest is None or newest.manifest is None:
            return ((secrets.token_hex(4), 0),)
        if newest.step == step and newest.manifest.summary.lineage == lineage:
            return lineage
        return (*lineage, (secrets.token_hex(4), step))
