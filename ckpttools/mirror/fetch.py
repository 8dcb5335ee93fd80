# SPDX-License-Identifier: Apache-2.0
"""Fetch copies from a mirror: for a restore, the nearest intact one; by hand, one step.

A local step is tried before its copy at the mirror, and a newer step before an older one. A copy is fetched only when
it is tried, into staging. Its files are verified by their digests as they arrive, its leaves as they are read, and only
a step that was restored is committed to the run directory.
"""

import contextlib
import os
import pathlib
import secrets
import shutil
import warnings
from collections.abc import Callable

from ..errors import (
    CheckpointError,
    CheckpointWarning,
    DiskSpaceError,
    MirrorError,
    RunInUseError,
    StepNotFoundError,
    StorageError,
)
from ..restore.select import Selector, list_available_steps, list_candidates, require_selector, select_one_branch
from ..spec.mirror import Mirror, as_mirror
from ..store import commit, layout, path_kinds
from ..store.catalogue import Catalogue, Entry
from ..store.run_directory import RunDirectory
from .merge_copies import merge_copies
from .remote_store import Copy, RemoteStore

_PACKAGE = str(pathlib.Path(__file__).parents[1])

type Progress = Callable[[int, int], None]


class Fetcher:
    """Fetches copies for one restore, from `list_candidates` to `clean_up`.

    Args:
        run: The run to fetch to.
        mirror: The mirror of the spec.
        store: Its store.
        progress: Called with the bytes fetched so far and their total.

    Attributes:
        error: Why the store could not be read; None if it answered.
    """

    def __init__(
        self,
        run: RunDirectory,
        mirror: Mirror,
        store: RemoteStore,
        progress: Progress | None = None,
    ) -> None:
        self._run, self._mirror, self._store, self._progress = run, mirror, store, progress
        self._staging_directories: list[pathlib.Path] = []
        self._marks = contextlib.ExitStack()
        self._listed_identities: frozenset[tuple[int, int] | None] = frozenset()
        self.error: MirrorError | None = None

    def list_candidates(self, selector: Selector) -> list[Entry]:
        """Return local steps and copies in the order in which they are tried.

        Raises:
            MirrorError: If the run has no local step and the store, which may hold one, does not answer.
            StepNotFoundError: If the requested step is in neither place.
        """
        require_selector(selector)
        local = self._list_local_steps()
        try:
            copies = self._store.list_copies()
        except MirrorError as error:
            self.error = error
            if self._mirror.must_answer and not self._run.is_used():
                raise _make_unreachable_error(self._run.directory, error) from error
            return list_candidates(local, selector)
        both = merge_copies(local, [(copy, self._make_entry(copy)) for copy in copies])
        if not isinstance(selector, int):
            return list_candidates(both, selector)
        found = select_one_branch([entry for entry in both.entries if entry.step == selector])
        if not found:
            raise StepNotFoundError(
                what=f"step {selector} does not exist.",
                why="it was never saved, or retention has deleted it here and at the mirror.",
                fix=f"available: {list_available_steps(both)}.",
            )
        return found

    def find_copy(self, selector: Selector) -> Entry:
        """Return the copy to fetch for a selector, regardless of the local steps.

        Raises:
            StepNotFoundError: If the mirror has no such copy.
            MirrorError: If the store does not answer.
        """
        copies = self._store.list_copies()
        both = merge_copies(self._list_local_steps(), [(copy, self._make_entry(copy)) for copy in copies])
        if isinstance(selector, int):
            chosen = select_one_branch([entry for entry in both.entries if entry.step == selector and entry.fetch])
        else:
            chosen = list_candidates(both, selector)
        found = next((entry for entry in chosen if entry.fetch), None)
        if found is None:
            steps = sorted({copy.manifest.summary.step for copy in copies})
            raise StepNotFoundError(
                what=f"{self._store.url} has no {'step of this run' if selector == 'latest' else f'step {selector}'}.",
                why="it was never copied, or the mirror's retention has deleted it.",
                fix=f"available: {', '.join(map(str, steps)) or 'no steps'}.",
            )
        return found

    def _list_local_steps(self) -> Catalogue:
        steps = self._run.refresh_steps()
        self._listed_identities = frozenset(entry.identity for entry in steps.committed_entries)
        return steps

    def _make_entry(self, copy: Copy) -> Entry:
        holder = layout.get_control_path(self._run.directory, f"staging/{copy.name}-{secrets.token_hex(4)}")
        directory = holder / str(copy.manifest.summary.step)
        return Entry(
            step=copy.manifest.summary.step,
            path=directory,
            state="committed",
            manifest=copy.manifest,
            fetch=lambda: self._fetch(copy, directory),
        )

    def _fetch(self, copy: Copy, directory: pathlib.Path) -> None:
        needed = copy.manifest.summary.total_bytes
        self._staging_directories.append(directory.parent)
        try:
            commit.require_confined(self._run.directory)
            commit.make_directory(directory.parent)
            self._marks.enter_context(commit.mark_in_use(directory.parent))
            free = shutil.disk_usage(directory.parent).free
            if free < needed:
                raise DiskSpaceError(
                    what=f"step {copy.manifest.summary.step} at the mirror takes {needed:,} bytes; {free:,} are free.",
                    why="a step is fetched to the run directory before it is restored.",
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
                why="a copy is written to the run directory before it is restored.",
                fix="fix the cause and restore again; nothing was changed.",
            ) from error

    def commit(self, entry: Entry) -> None:
        """Commit a fetched step that was restored, unless another process writes to the run, or has saved that step.

        If this fails, the state was restored all the same, and its step is still at the mirror: it warns.
        """
        try:
            self.commit_copy(entry)
        except RunInUseError:
            return
        except StorageError as error:
            text = f"step {entry.step} was restored from the mirror, where it stays: {error.what}"
            warnings.warn(text, CheckpointWarning, stacklevel=2, skip_file_prefixes=(_PACKAGE,))

    def commit_copy(self, entry: Entry, *, replaces: bool = False) -> None:
        """Commit a fetched step.

        Args:
            entry: The step; nothing is done for a local one.
            replaces: Whether a local step of the run's branch is moved to quarantine for it.

        Raises:
            StorageError: If it cannot be committed; the local step of that number is where it was.
            RunInUseError: If another process writes to the run.
        """
        if entry.fetch is None or entry.manifest is None:
            return
        root, was_held, summary = self._run.directory, self._run.lock.is_held, entry.manifest.summary
        try:
            with commit.wrap_os_errors(f"step {entry.step} was fetched but cannot be committed to {root}"):
                self._run.lock.acquire()
                self._run.invalidate()
                live = [each for each in self._run.get_steps().live_entries if each.step == entry.step]
                if any(each.identity not in self._listed_identities for each in live):
                    return  # Saved or fetched since by another process: the copy must not supersede it.
                commit.commit_step(root, entry.path, entry.step, replaces=replaces and bool(live))
        finally:
            self._run.invalidate()
            if not was_held:
                self._run.lock.release()
        spare = layout.get_spare_directory(root, summary.sequence)
        commit.copy_small_files(layout.get_step_directory(root, entry.step), spare)
        with commit.wrap_os_errors(f"the metrics of step {entry.step} cannot be written to {root}"):
            self._store.fetch_metrics(root, summary)

    def clean_up(self) -> None:
        """Remove copies that were fetched but not committed."""
        self._marks.close()
        for holder in self._staging_directories:
            shutil.rmtree(holder, ignore_errors=True)


def _make_unreachable_error(directory: pathlib.Path, error: MirrorError) -> MirrorError:
    return MirrorError(
        what=f"{directory} holds no steps, and the mirror does not answer: {error.what}",
        why="the run may be at the mirror, and a fresh start would train it again.",
        fix="try again; for a new run, omit the mirror, or pass ct.Mirror(url, must_answer=False).",
    )


def fetch_step(
    directory: str | os.PathLike[str],
    mirror: Mirror | str,
    step: int | None = None,
    *,
    progress: Progress | None = None,
) -> int:
    """Fetch a step from a mirror into a run directory; a local step of that number is moved to quarantine.

    Args:
        directory: The run directory; created if it does not exist.
        mirror: The mirror or its address.
        step: Number of the step; None for the newest.
        progress: Called with the bytes fetched so far and their total.

    Returns:
        The number of the step.

    Raises:
        NotARunError: If the directory is a step, is inside one, or contains another program's checkpoints.
        StepNotFoundError: If the mirror has no such step.
        StepDamagedError: If its copy is damaged.
        MirrorError: If the store does not answer.
        StorageError: If the step cannot be written; a local step of that number is where it was.
        RunInUseError: If a process writes to the run.

    Example:
        >>> import pathlib, tempfile, jax.numpy as jnp, ckpttools as ct
        >>> root = pathlib.Path(tempfile.mkdtemp())
        >>> with ct.open(ct.CheckpointSpec(directory=root / "run", mirror=f"file://{root}/copies")) as ckpt:
        ...     _ = ckpt.save(1, {"model": {"w": jnp.ones(2)}})
        >>> ct.fetch_step(root / "another", f"file://{root}/copies")
        1
    """
    place = as_mirror(mirror)
    assert place is not None
    path_kinds.require_startable(directory)
    run = RunDirectory(pathlib.Path(directory).absolute())
    run.lock_for_writing()
    fetcher = Fetcher(run, place, RemoteStore(place.url, place.store_options), progress)
    try:
        entry = fetcher.find_copy("latest" if step is None else step)
        assert entry.fetch is not None
        entry.fetch()
        fetcher.commit_copy(entry, replaces=True)
        return entry.step
    finally:
        fetcher.clean_up()
        run.lock.release()
