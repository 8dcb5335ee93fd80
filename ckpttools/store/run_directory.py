# SPDX-License-Identifier: Apache-2.0
"""A run's directory as one object: its steps, its pins, its lock, and what retention deletes from it."""

import contextlib
import dataclasses
import os
import pathlib
import secrets
import shutil
from collections.abc import Iterator, Sequence

from ..errors import StepDamagedError, StepNotFoundError, StepOrderError, VersionError
from ..spec import retention
from . import catalogue, commit, late_metrics, layout, lock, path_kinds
from .catalogue import Catalogue, Entry
from .formats import foreign_layouts
from .manifest import Lineage, read_sealed
from .manifest import read as read_manifest


def require_run_directory(directory: str | os.PathLike[str]) -> pathlib.Path:
    """Return the absolute path of a run's directory.

    Raises:
        NotARunError: If it does not exist, or is a file, a step or part of one, or contains runs: a misspelt path must
            not be mistaken for an intact or empty run.
    """
    found = path_kinds.identify(directory)
    if found.kind in ("missing", "file", "step", "inside", "parent"):
        raise path_kinds.make_not_a_run_error(found, "a run is a directory with a numbered directory for each step.")
    return found.path


class RunDirectory:
    """The steps of one run, as this process knows them.

    The holder of the lock makes every change, so it knows them all; any other process has to read again.
    """

    def __init__(self, directory: pathlib.Path) -> None:
        self.directory = directory
        self.lock = lock.WriterLock(directory)
        self._steps: Catalogue | None = None
        self._metric_files: frozenset[str] = frozenset()
        self._pins: frozenset[int] = frozenset()

    def is_used(self) -> bool:
        """Whether there is a numbered directory or foreign checkpoint, complete or not; cheaper than `get_steps`.

        Superseded steps count although they are not candidates for a restore: a run must not begin beside them.
        """
        with commit.wrap_os_errors(f"{self.directory} cannot be listed"):
            if not self.directory.is_dir():
                return False
            superseded = layout.get_control_path(self.directory, "superseded")
            for directory in (self.directory, *([superseded] if superseded.is_dir() else [])):
                names = (name.partition("-")[0] if directory == superseded else name for name in os.listdir(directory))
                if any(layout.parse_step_number(name) is not None for name in names):
                    return True
            return foreign_layouts.find_foreign_files(self.directory).steps != ()

    def refresh_steps(self) -> Catalogue:
        """Return the current steps, read again unless this process makes all changes and none was removed by hand."""
        if not self.lock.is_held or not all(entry.path.exists() for entry in self.get_steps().committed_entries):
            self.invalidate()
        return self.get_steps()

    def get_steps(self) -> Catalogue:
        """Return the steps as they were last read, with the metrics and pins that any process has recorded since."""
        names, pins = self._read_records()
        if self._steps is None or pins != self._pins:
            self._steps, self._metric_files, self._pins = catalogue.scan(self.directory), names, pins
        if names != self._metric_files:
            files = late_metrics.read_files(self.directory, names)
            self._steps, self._metric_files = catalogue.add_metrics(self._steps, files), names
        return self._steps

    def invalidate(self) -> None:
        """Read the directory again when the steps are next requested: something in it was moved."""
        self._steps = None

    def lock_for_writing(self) -> None:
        """Take the lock, and then remove what a killed writer left.

        Raises:
            RunInUseError: If another process holds the lock.
            StorageError: If the directory cannot be written.
        """
        if not self.lock.is_held:
            commit.require_writable(self.directory)
            self.lock.acquire()
            with commit.wrap_os_errors(f"what a killed process left in {self.directory} cannot be removed"):
                self._put_back_kept_steps()
                commit.sweep(self.directory)
                lock.sweep_pins(self.directory)
            self.invalidate()

    def _put_back_kept_steps(self) -> None:
        """Move whole steps from the trash back if they are pinned, or metrics were recorded for them.

        Another process may have done that right before the step was moved; a writer that was killed could not put it
        back. The next save decides again what is kept.
        """
        trash, pins = layout.get_control_path(self.directory, "trash"), catalogue.read_pins(self.directory)
        files = late_metrics.read_files(self.directory, late_metrics.list_names(self.directory))
        recorded = {each.key for each in files.values()}
        for path in sorted(trash.iterdir()) if trash.is_dir() and (pins or recorded) else ():
            with contextlib.suppress(StepDamagedError, VersionError, NotADirectoryError):
                summary = read_manifest(path).summary
                if summary.step in pins or late_metrics.get_key(summary) in recorded:
                    place = layout.get_step_directory(self.directory, summary.step)
                    if os.path.lexists(place):
                        aside = layout.get_control_path(self.directory, "superseded")
                        place = layout.find_free_path(aside, str(summary.step))
                    commit.move(path, place)

    @contextlib.contextmanager
    def hold_for_writing(self) -> Iterator[None]:
        """Hold the lock in a `with` statement, as `lock_for_writing` takes it; afterwards it is as it was before."""
        was_held = self.lock.is_held
        self.lock_for_writing()
        try:
            yield
        finally:
            if not was_held:
                self.lock.release()

    def quarantine(self, entry: Entry) -> pathlib.Path | None:
        """Move a damaged step to quarantine; return None if another process writes to the run or the disk is read-only.

        A reader must not move a writer's steps: one that is being deleted looks damaged, too. Under the lock it is
        examined again, since a writer that has ended meanwhile may have replaced it by an intact one.
        """
        try:
            with self.lock.hold():
                self.invalidate()
                return commit.quarantine(self.directory, entry.path) if catalogue.is_still_damaged(entry) else None
        except OSError:
            return None

    def add(self, path: pathlib.Path) -> None:
        """Add a step that was just committed."""
        if self._steps is not None:
            self._steps = catalogue.add_step(self._steps, path, catalogue.read_pins(self.directory))
            self._metric_files = frozenset()  # to be added again

    def has_step(self, step: int, lineage: Lineage) -> bool:
        """Return whether a lineage already has this step; another branch may have one of the same number."""
        found = [entry for entry in self.get_steps().committed_entries if entry.step == step]
        if not all(entry.path.exists() for entry in found):
            self.invalidate()  # Somebody has removed it by hand, also from a run that is open.
            return self.has_step(step, lineage)
        return any(entry.manifest and catalogue.is_live(entry.manifest.summary, lineage) for entry in found)

    def pin(self, *steps: int, pinned: bool) -> None:
        """Protect committed steps from retention, or with `pinned=False` no longer: all of them or none.

        Raises:
            StepNotFoundError: If one of them is not a committed step, or was deleted meanwhile; nothing was pinned.
        """
        with lock.hold_pins_lock(self.directory):
            self._require_committed(steps, pinned=pinned)
            pins = catalogue.read_pins(self.directory)
            with commit.wrap_os_errors(f"the pin of step {', '.join(map(str, steps))} cannot be written"):
                catalogue.write_pins(self.directory, pins.union(steps) if pinned else pins.difference(steps))
            self.invalidate()
            try:
                # A writer that deletes steps looks for pins after it has moved one, and this looks after it has pinned.
                self._require_committed(steps, pinned=pinned)
            except StepNotFoundError:
                catalogue.write_pins(self.directory, pins)
                self.invalidate()
                raise

    def _require_committed(self, steps: Sequence[int], *, pinned: bool) -> None:
        if not self.lock.is_held:
            self.invalidate()
        committed = {entry.step for entry in self.get_steps().committed_entries}
        wrong = [step for step in steps if type(step) is not int or (pinned and step not in committed)]
        if wrong:
            raise StepNotFoundError(
                what=f"step {wrong[0]!r} cannot be pinned: it is not a committed step.",
                why="the pin would protect nothing."
                if len(steps) == 1
                else "the pin would protect nothing; none of the steps was pinned.",
                fix=f"committed: {', '.join(map(str, sorted(committed))) or 'no steps'}.",
            )

    def decide_retention(self, keep: retention.Retention) -> list[retention.Verdict]:
        """Return what a retention value would keep and delete now, with reasons."""
        self._invalidate_if_changed()
        current = self.get_steps()
        infos = [entry.info for entry in current.committed_entries if entry.info]
        newest = current.newest_entry
        return retention.decide_retention(keep, infos, newest_verified=_get_sequence(newest) if newest else None)

    def prune(self, keep: retention.Retention, next_lineage: Lineage = ()) -> tuple[int, ...]:
        """Delete what `keep` does not keep; return the steps.

        Args:
            keep: What to keep.
            next_lineage: The lineage of an uncommitted save: the step that it continues from is kept.
        """
        deleted: list[int] = []
        # If a metric is recorded while steps are being deleted, retention is decided again.
        while unwanted := self._list_unwanted(keep, next_lineage):
            decided_by = self._metric_files, self._pins
            for entry in unwanted:
                if not self._remove(entry, decided_by):
                    break
                deleted.append(entry.step)
        if deleted:
            committed = self.get_steps().committed_entries
            summaries = [entry.manifest.summary for entry in committed if entry.manifest]
            late_metrics.sweep(self.directory, summaries, self._list_unread_steps())
        return tuple(deleted)

    def _list_unread_steps(self) -> set[int]:
        """Return the numbers of steps whose manifests cannot be read now, but perhaps later."""
        numbers = {entry.step for entry in self.get_steps().entries if entry.manifest is None}
        for part in ("quarantine", "superseded"):
            directory = layout.get_control_path(self.directory, part)
            names = os.listdir(directory) if directory.is_dir() else []
            found = (layout.parse_step_number(name.partition("-")[0]) for name in names)
            numbers.update(number for number in found if number is not None)
        return numbers

    def _list_unwanted(self, keep: retention.Retention, next_lineage: Lineage) -> list[Entry]:
        verdicts = self.decide_retention(keep)
        # Not by number, which two branches may share, nor by sequence: a copied step has that of another.
        unwanted = {id(verdict.step) for verdict in verdicts if not verdict.keep}
        committed = self.get_steps().committed_entries
        base = _find_newest_of(committed, next_lineage)
        return [entry for entry in committed if id(entry.info) in unwanted and entry is not base]

    def list_quarantined(self) -> list[pathlib.Path]:
        """Return the names of what may be deleted from quarantine.

        A step that was committed after all intact ones stays: its second copies name the run's branch.
        """
        directory = layout.get_control_path(self.directory, "quarantine")
        with commit.wrap_os_errors(f"{directory} cannot be listed"):
            found = sorted(directory.iterdir()) if directory.is_dir() else []
        current = self.refresh_steps()
        newest = max((entry.info.sequence for entry in current.committed_entries if entry.info), default=0)
        return found if current.last_sequence <= newest else []

    def empty_quarantine(self) -> tuple[str, ...]:
        """Delete what may be deleted from quarantine; return the names."""
        deleted = self.list_quarantined()
        for path in deleted:
            with commit.wrap_os_errors(f"{path} cannot be deleted"):
                commit.discard(self.directory, path)
        self._remove_spares({layout.parse_step_number(path.name.partition("-")[0]) for path in deleted})
        return tuple(path.name for path in deleted)

    def _remove_spares(self, steps: set[int | None]) -> None:
        """Delete the second copies of steps that no longer exist."""
        current = self.get_steps()
        committed = {entry.info.sequence for entry in current.committed_entries if entry.info}
        damaged = {entry.step for entry in current.entries if entry.info is None}
        for number in catalogue.list_spares(self.directory):
            spare = layout.get_spare_directory(self.directory, number)
            with contextlib.suppress(StepDamagedError, VersionError, OSError):
                step = read_sealed(spare).summary.step
                if number not in committed and step in steps - damaged:
                    shutil.rmtree(spare)

    def _invalidate_if_changed(self) -> None:
        """Read the steps again if one was deleted or damaged: it must not count as kept, least of all a newest one."""
        current = self.get_steps()
        newest = sorted(current.live_entries, key=_get_sequence)[-retention.MIN_KEPT_STEPS :]
        are_there = all(entry.path.exists() for entry in current.committed_entries)
        if not are_there or any(map(catalogue.is_damaged_now, newest)):
            self.invalidate()

    def _remove(self, entry: Entry, decided_by: tuple[frozenset[str], frozenset[int]] | None = None) -> bool:
        """Delete a step; return whether it was deleted.

        Args:
            entry: The step.
            decided_by: The files with metrics and the pins that retention has decided by: the step stays if another
                process has changed them. `record` and `pin` look whether the step is there after they have written, so
                this looks after the step was moved: one of the two sees the other.
        """
        current = self.get_steps()
        self.invalidate()  # If the disk fails in between, the directory has to be read again.
        with commit.wrap_os_errors(f"step {entry.step} cannot be deleted"):
            in_trash = commit.move_to_trash(self.directory, entry.path)
            if decided_by is not None and decided_by != self._read_records():
                commit.move(in_trash, entry.path)
                return False
            commit.delete_tree(in_trash)
        spare = layout.get_spare_directory(self.directory, entry.info.sequence if entry.info else 0)
        shutil.rmtree(spare, ignore_errors=True)
        self._steps = dataclasses.replace(
            current,
            entries=tuple(each for each in current.entries if each.path != entry.path),
            moved_entries=tuple(each for each in current.moved_entries if each.path != entry.path),
        )
        return True

    def _read_records(self) -> tuple[frozenset[str], frozenset[int]]:
        """Return the files with metrics and the pins, which any process may add to."""
        return late_metrics.list_names(self.directory), catalogue.read_pins(self.directory)

    def delete(self, step: int) -> None:
        """Delete one committed step of the run's branch, whatever the retention says; never the newest.

        Raises:
            StepNotFoundError: If the step does not exist.
            StepOrderError: If it is the newest.
        """
        current = self.get_steps()
        entry = next((entry for entry in current.live_entries if entry.step == step), None)
        if entry is None:
            raise StepNotFoundError(
                what=f"step {step} cannot be deleted: it is not a committed step.",
                why="it was never saved, or retention has deleted it.",
                fix=f"committed: {', '.join(str(entry.step) for entry in current.live_entries) or 'no steps'}.",
            )
        if entry is current.newest_entry:
            raise StepOrderError(
                what=f"step {step} is the newest and was not deleted.",
                why="a restart continues from it.",
                fix="save the next step first.",
            )
        self._remove(entry)

    def derive_lineage(self, step: int, lineage: Lineage) -> Lineage:
        """Return the lineage of what follows a restored step: its branch, or a new one if the run went on from there.

        A branch supersedes the later steps with its first save, not before: restoring alone changes nothing.
        """
        current = self.get_steps()
        if not current.committed_entries:
            return ((secrets.token_hex(4), 0),)
        # The lineage of the run, not of its newest intact step: if the first step of a branch is damaged, continuing
        # the old branch from its base would make the superseded steps live again.
        is_last = current.lineage == lineage and not self.list_superseded_by(step, lineage)
        return lineage if is_last else (*lineage, (secrets.token_hex(4), step))

    def list_superseded_by(self, step: int, lineage: Lineage) -> tuple[int, ...]:
        """Return the live steps that a save supersedes if the run continues from this step, in increasing order."""
        live = self.get_steps().live_entries
        remaining = (*lineage, ("", step))
        lost = (each.step for each in live if each.manifest and not catalogue.is_live(each.manifest.summary, remaining))
        return tuple(sorted(lost))


def _find_newest_of(entries: Sequence[Entry], lineage: Lineage) -> Entry | None:
    """Return the step that a save of this lineage continues from; None if there is none."""
    found = [each for each in entries if each.manifest and catalogue.is_live(each.manifest.summary, lineage)]
    return max(found, key=lambda entry: (entry.step, _get_sequence(entry)), default=None)


def _get_sequence(entry: Entry) -> int:
    return entry.info.sequence if entry.info else 0
