# SPDX-License-Identifier: Apache-2.0
"""Restore from the nearest intact copy: a local step before its copy at the mirror, a newer step before an older one.

The steps of both places are put in one order. A copy is fetched when its turn comes, into staging; its files are
proved by their digests as they come in, its leaves as they are read, and only a step that was restored is committed
to the run's folder.

Whether a copy belongs to the run's own branch is judged by the local steps, as long as there are any: on one branch a
later step is saved later, so a copy with a greater number that was saved earlier is of a past that the run has left.
"""

import dataclasses
import pathlib
import secrets
import shutil
from collections.abc import Callable, Sequence

from ..errors import CheckpointError, DiskSpaceError, MirrorError, StepNotFoundError, StorageError
from ..restore.select import Selector, list_candidates, require_selector
from ..spec.mirror import Mirror
from ..spec.retention import StepInfo
from ..store import catalogue, commit, confine, layout
from ..store.catalogue import Catalogue, Entry
from ..store.manifest import Lineage, Summary
from ..store.run_directory import RunDirectory
from .remote import Copy, RemoteStore


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


def merge_copies(steps: Catalogue, copies: Sequence[tuple[Copy, Entry]]) -> Catalogue:
    """The steps of a run and their copies in one list, local ones first, for choosing among them.

    Args:
        steps: The run's steps.
        copies: Finished copies, each with the entry that fetches it.
    """
    newest = steps.newest_entry.manifest.summary if steps.newest_entry and steps.newest_entry.manifest else None
    last = max((copy.manifest.summary for copy, _ in copies), key=lambda summary: summary.saved_at, default=None)
    lineage = _choose_lineage(newest, last)
    placed = []
    for entry in (*steps.entries, *steps.moved_entries):
        live = entry.manifest is not None and catalogue.is_live(entry.manifest.summary, lineage)
        placed.append((entry, live and entry not in steps.moved_entries))
    for _, entry in copies:
        if entry.manifest is not None:
            placed.append((entry, _is_live_copy(entry.manifest.summary, lineage, newest)))
    # The metric of a local step and of its copy are equal: the greater number makes the local one the first.
    order_of_commit = sorted(
        (entry for entry, _ in placed if entry.manifest),
        key=lambda entry: (entry.manifest.summary.saved_at if entry.manifest else 0.0, entry.fetch is None),
    )
    number = {entry.path: index for index, entry in enumerate(order_of_commit, start=1)}
    return Catalogue(tuple(_renumber(entry, live, number.get(entry.path, 0)) for entry, live in placed))


def _renumber(entry: Entry, is_live: bool, sequence: int) -> Entry:
    if entry.manifest is None:
        return entry
    summary = entry.manifest.summary
    info = StepInfo(
        step=summary.step,
        sequence=sequence,
        saved_at=summary.saved_at,
        metrics=summary.metrics,
        superseded=not is_live,
    )
    return dataclasses.replace(entry, info=info)


def _choose_lineage(newest_local: Summary | None, newest_copy: Summary | None) -> Lineage:
    """The run's lineage: the local one, unless the run went on elsewhere from one of its steps."""
    if newest_local is None or newest_copy is None:
        known = newest_local or newest_copy
        return known.lineage if known else ()
    went_on = (
        newest_copy.lineage[: len(newest_local.lineage)] == newest_local.lineage
        and newest_copy.saved_at > newest_local.saved_at
    )
    return newest_copy.lineage if went_on else newest_local.lineage


def _is_live_copy(summary: Summary, lineage: Lineage, newest: Summary | None) -> bool:
    left_behind = newest is not None and summary.step > newest.step and summary.saved_at < newest.saved_at
    return catalogue.is_live(summary, lineage) and not left_behind


def _make_unreachable_error(directory: pathlib.Path, error: MirrorError) -> MirrorError:
    return MirrorError(
        what=f"{directory} holds no steps, and the mirror does not answer: {error.what}",
        why="the run may be at the mirror; to begin afresh would train it again.",
        fix="try again; for a new run drop the mirror, or say Mirror(url, must_answer=False).",
    )
