# SPDX-License-Identifier: Apache-2.0
"""Fetch copies from a mirror: for a restore, the nearest intact one; by hand, one step.

A local step is tried before its copy at the mirror, and a newer step before an older one. A copy is fetched only when
it is tried, into staging. Its files are verified by their digests as they arrive, its leaves as they are read, and only
a step that was restored is committed to the run directory.
"""

import os
import pathlib
import secrets
import shutil
from collections.abc import Callable

from ..errors import CheckpointError, DiskSpaceError, MirrorError, StepNotFoundError, StorageError
from ..restore.select import Selector, list_candidates, require_selector
from ..spec.mirror import Mirror, as_mirror
from ..store import commit, confine, layout
from ..store.catalogue import Entry
from ..store.run_directory import RunDirectory
from .merge_copies import merge_copies
from .remote_store import Copy, RemoteStore

type Progress = Callable[[int, int], None]


class Fetcher:
    """The copies of one restore, from `list_candidates` to `clean_up`.

    Attributes:
        error: Why the store could not be asked; None if it answered.
    """

    def __init__(
        self,
        run: RunDirectory,
        mirror: Mirror,
        store: RemoteStore,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self._run, self._mirror, self._store, self._progress = run, mirror, store, progress
        self._staging_directories: list[pathlib.Path] = []
        self.error: MirrorError | None = None

    def list_candidates(self, selector: Selector) -> list[Entry]:
        """Local steps and copies, the one to try first in front.

        Raises:
            MirrorError: If there is no local step and the store does not answer: the run may be there.
            StepNotFoundError: If the step that is asked for is in neither place.
        """
        require_selector(selector)
        known = self._run.refresh_steps()
        try:
            copies = self._store.list_copies()
        except MirrorError as error:
            self.error = error
            if self._mirror.must_answer and not self._run.is_used():
                raise _make_unreachable_error(self._run.directory, error) from error
            return list_candidates(known, selector)
        both = merge_copies(known, [(copy, self._make_entry(copy)) for copy in copies])
        if not isinstance(selector, int):
            return list_candidates(both, selector)
        found = [entry for entry in (*both.entries, *both.moved_entries) if entry.step == selector]
        if not found:
            steps = sorted({entry.step for entry in both.entries})
            raise StepNotFoundError(
                what=f"there is no step {selector}.",
                why="it was never saved, or retention has deleted it here and at the mirror.",
                fix=f"there are {', '.join(map(str, steps)) or 'no steps'}.",
            )
        return found

    def find_copy(self, selector: Selector) -> Entry:
        """The copy to fetch for a selector, whatever there is in the run's folder.

        Raises:
            StepNotFoundError: If the mirror has none.
            MirrorError: If the store does not answer.
        """
        copies = self._store.list_copies()
        both = merge_copies(self._run.refresh_steps(), [(copy, self._make_entry(copy)) for copy in copies])
        chosen = both.entries if isinstance(selector, int) else tuple(list_candidates(both, selector))
        wanted = (entry for entry in chosen if entry.fetch and selector in (entry.step, "latest"))
        found = next(wanted, None)
        if found is None:
            steps = sorted({copy.manifest.summary.step for copy in copies})
            raise StepNotFoundError(
                what=f"{self._store.url} has no {'step of this run' if selector == 'latest' else f'step {selector}'}.",
                why="it was never copied, or the mirror's retention has deleted it.",
                fix=f"there are {', '.join(map(str, steps)) or 'no steps'}.",
            )
        return found

    def _make_entry(self, copy: Copy) -> Entry:
        holder = layout.get_control_path(self._run.directory, f"staging/{copy.name}-{secrets.token_hex(4)}")
        folder = holder / str(copy.manifest.summary.step)
        return Entry(
            step=copy.manifest.summary.step,
            path=folder,
            state="committed",
            manifest=copy.manifest,
            fetch=lambda: self._fetch(copy, folder),
        )

    def _fetch(self, copy: Copy, directory: pathlib.Path) -> None:
        needed = copy.manifest.summary.total_bytes
        self._staging_directories.append(directory.parent)
        try:
            confine.require_confined(self._run.directory)
            commit.make_directory(directory.parent)
            free = shutil.disk_usage(directory.parent).free
            if free < needed:
                raise DiskSpaceError(
                    what=f"step {copy.manifest.summary.step} at the mirror takes {needed:,} bytes; {free:,} are free.",
                    why="a step is fetched to the run's folder before it is restored.",
                    fix="free some space and restore again.",
                )
            done = 0

            def add_bytes(size: int) -> None:
                nonlocal done
                done += size
                if self._progress is not None:
                    self._progress(done, needed)

            self._store.fetch(copy, directory, add_bytes)
        except MirrorError as error:
            self.error = error
            raise
        except CheckpointError:
            raise
        except OSError as error:
            raise StorageError(
                what=f"step {copy.manifest.summary.step} could not be fetched from the mirror: {error}.",
                why="it is written to the run's folder first.",
                fix="mend the cause and restore again; nothing was changed.",
            ) from error

    def commit(self, entry: Entry) -> None:
        """Commit a fetched step that was restored; another process that writes to the run keeps it from that."""
        if entry.fetch is None:
            return
        root, held = self._run.directory, self._run.lock.is_held
        try:
            self._run.lock.acquire()
            commit.commit_step(root, entry.path, entry.step)
            if entry.manifest is not None:
                spare = layout.get_spare_directory(root, entry.manifest.summary.sequence)
                commit.copy_small_files(layout.get_step_directory(root, entry.step), spare)
        except OSError:
            # The state was restored all the same; only its step stays at the mirror.
            return
        finally:
            self._run.invalidate()
            if not held:
                self._run.lock.release()

    def clean_up(self) -> None:
        """Remove what was fetched and not committed."""
        for holder in self._staging_directories:
            shutil.rmtree(holder, ignore_errors=True)


def _make_unreachable_error(directory: pathlib.Path, error: MirrorError) -> MirrorError:
    return MirrorError(
        what=f"{directory} holds no steps, and the mirror does not answer: {error.what}",
        why="the run may be at the mirror; to begin afresh would train it again.",
        fix="try again; for a new run drop the mirror, or say Mirror(url, must_answer=False).",
    )


def fetch_step(
    directory: str | os.PathLike[str],
    mirror: Mirror | str,
    step: int | None = None,
    *,
    progress: Progress | None = None,
) -> int:
    """Bring a step from a mirror to a run's folder, by default the newest; a damaged one there is set aside.

    Args:
        directory: The run's folder; made if need be.
        mirror: The mirror or its address.
        step: Which step.
        progress: Called with the bytes that were fetched and those there are.

    Returns:
        Its number.

    Raises:
        StepNotFoundError: If the mirror has no such step.
        StepDamagedError: If its copy is damaged.
        MirrorError: If the store does not answer.
        RunInUseError: If a process writes to the run.
    """
    place = as_mirror(mirror)
    assert place is not None
    run = RunDirectory(pathlib.Path(directory).absolute())
    run.lock_for_writing()
    fetcher = Fetcher(run, place, RemoteStore(place.url, place.store_options), progress)
    try:
        entry = fetcher.find_copy("latest" if step is None else step)
        assert entry.fetch is not None
        entry.fetch()
        in_the_way = layout.get_step_directory(run.directory, entry.step)
        if in_the_way.exists() and not _is_superseded(run, entry.step):
            run.quarantine(in_the_way)
        fetcher.commit(entry)
        return entry.step
    finally:
        fetcher.clean_up()
        run.lock.release()


def _is_superseded(run: RunDirectory, step: int) -> bool:
    return any(entry.step == step and entry.info and entry.info.superseded for entry in run.refresh_steps().entries)
