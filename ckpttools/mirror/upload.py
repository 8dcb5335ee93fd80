# SPDX-License-Identifier: Apache-2.0
"""Copy every committed step to the mirror from a background thread, whatever the store does.

The thread is woken by each commit, and by a timer while the store does not answer. It copies what `upload_plan` finds
missing, the newest step first.

Nothing here raises in the training loop. Failures become notes, which the session turns into warnings. The calling
thread never holds the thread's lock, since an interrupted call might not release it.
"""

import collections
import dataclasses
import os
import pathlib
import shutil
import threading
from collections.abc import Iterable

from ..errors import CheckpointError, StepDamagedError
from ..spec.mirror import Mirror
from ..spec.retention import Retention
from ..store import catalogue, layout
from ..store.catalogue import Catalogue, Entry
from ..store.manifest import Summary
from ..threads import run_outside_main_thread
from .remote_store import RemoteStore
from .status import MirrorStatus
from .upload_plan import CopyNames, NamedSummaries, UploadPlan, get_summaries, make_upload_plan, require_outside_run

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 60.0


class MirrorUploader:
    """Keeps a mirror up to date from a thread, from the first `update` to `close`.

    Args:
        root: The run directory.
        mirror: The mirror of the spec.
        keep: The run's retention, used if the mirror has none.

    Attributes:
        mirror: The mirror of the spec.
        store: Its store; not contacted before the first `update`.
    """

    def __init__(self, root: pathlib.Path, mirror: Mirror, keep: Retention) -> None:
        require_outside_run(root, mirror)
        self.mirror, self.store = mirror, RemoteStore(mirror.url, mirror.store_options)
        self._root, self._keep = root, mirror.keep or keep
        self._condition = threading.Condition()
        self._thread: threading.Thread | None = None
        self._is_closing = self._is_stopped = False
        self._version = 0
        self._copy_names = CopyNames()
        self._steps = Catalogue(())
        self._committed_summaries: dict[str, Summary] = {}
        self._copied_summaries: dict[str, Summary] = {}
        self._damaged_steps: dict[str, int] = {}
        self._missed_names: set[str] = set()
        self._current_name = ""
        self._has_noted_foreign = self._has_noted_failure = False
        self._status = MirrorStatus(url=mirror.url)
        self._notes: collections.deque[str] = collections.deque()

    @property
    def status(self) -> MirrorStatus:
        """Return what the mirror holds and lacks."""
        return self._status

    def take_notes(self) -> list[str]:
        """Return the failures since the last call, each once."""
        return [self._notes.popleft() for _ in range(len(self._notes))]

    def update(self, steps: Catalogue) -> None:
        """Wake the thread with the steps that the run has now."""
        run_outside_main_thread(lambda: self._update(steps))

    def _update(self, steps: Catalogue) -> None:
        with self._condition:
            self._steps, self._version = steps, self._version + 1
            if not self._copied_summaries:
                # A restore has read these summaries already.
                self._copied_summaries = self.store.known_summaries
            self._committed_summaries |= get_summaries(self._copy_names.name_entries(steps))
            self._update_status(self._make_plan(self._copied_summaries))
            if self._thread is None:
                # A daemon: a store that hangs must not keep the process from ending.
                self._thread = threading.Thread(target=self._run, name="ckpttools-mirror", daemon=True)
                self._thread.start()
            self._condition.notify_all()

    def close(self) -> None:
        """Wait up to the mirror's `wait_s` for the copies; the next session copies the rest."""
        run_outside_main_thread(self._close)

    def _close(self) -> None:
        thread, self._thread = self._thread, None
        if thread is None:
            return
        with self._condition:
            self._is_closing = True
            self._condition.notify_all()
        thread.join(self.mirror.wait_s)
        with self._condition:
            self._is_stopped = True
            status = self._status
            if status.pending:
                steps = ", ".join(map(str, status.pending))
                reason = status.error or f"the copy takes longer than wait_s={self.mirror.wait_s:g}."
                self._notes.append(f"not copied to the mirror: {steps}; the next session does. {reason}")

    def _run(self) -> None:
        pause_s, done = _FIRST_PAUSE_S, 0
        while True:
            with self._condition:
                if self._version == done and not self._is_closing:
                    self._condition.wait(pause_s if self._status.error else None)
                version, closing = self._version, self._is_closing
            try:
                self._sync()
                pause_s = _FIRST_PAUSE_S
            except InterruptedError:
                return
            except Exception as error:
                # Whatever a driver or the disk does, training continues; the next round plans again.
                self._record_failure(error)
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
            done = version
            if closing:
                return

    def _sync(self) -> None:
        # A store that can be listed and read may still refuse writes: only a write proves that it is reachable.
        has_written = False
        with self._condition:
            ours = [
                *get_summaries(self._copy_names.name_entries(self._steps)).values(),
                *self._copied_summaries.values(),
            ]
        self.store.upload_metrics(self._root, ours)
        while True:
            names = self.store.list_names()
            found = {name: summary for name in names if (summary := self.store.read_summary(name))}
            with self._condition:
                local = self._copy_names.name_entries(self._steps)
                plan = self._make_plan(found, names)
                self._copied_summaries = found
                self._update_status(plan, is_reachable=has_written)
            name = next((name for name in plan.names_to_copy if name not in self._damaged_steps), None)
            if name is None:
                for name in plan.names_to_delete:
                    self.store.delete(name)
                with self._condition:
                    self._copied_summaries = {
                        name: copy for name, copy in found.items() if name not in plan.names_to_delete
                    }
                    self._update_status(plan, is_reachable=True)
                    self._has_noted_failure = False
                return
            has_written = self._upload(name, local[name]) or has_written

    def _make_plan(self, copies: NamedSummaries, names: Iterable[str] = ()) -> UploadPlan:
        local = get_summaries(self._copy_names.name_entries(self._steps))
        deleted = {
            name: summary
            for name, summary in self._committed_summaries.items()
            if name not in {*local, self._current_name}
        }
        pins = catalogue.read_pins(self._root)
        return make_upload_plan(
            local, copies, names, self._keep, lineage=self._steps.lineage, deleted=deleted, pins=pins
        )

    def _upload(self, name: str, entry: Entry) -> bool:
        """Copy one step from hard links to its files, so that retention cannot delete them half way.

        Returns:
            Whether the store accepted it; False if the local step was deleted or is damaged.
        """
        links = layout.get_control_path(self._root, f"outbox/{name}")
        self._current_name = name
        try:
            source = _link_files(entry, links)
            if source is None:
                return False
            self.store.upload(source, readback=self.mirror.verify == "readback", should_stop=lambda: self._is_stopped)
            return True
        except StepDamagedError as error:
            with self._condition:
                self._damaged_steps[name] = entry.step
                self._notes.append(f"step {entry.step} is not copied to the mirror: {error.what}")
            return False
        finally:
            self._current_name = ""
            shutil.rmtree(links, ignore_errors=True)

    def _update_status(self, plan: UploadPlan, *, is_reachable: bool = False) -> None:
        """Update the status and note missed steps; the caller holds the lock."""
        steps = {
            name: summary.step for name, summary in {**self._committed_summaries, **self._copied_summaries}.items()
        }
        status = dataclasses.replace(
            self._status,
            copied=tuple(sorted(summary.step for summary in self._copied_summaries.values())),
            pending=tuple(sorted(steps[name] for name in plan.names_to_copy if name not in self._damaged_steps)),
            missed=tuple(sorted(steps[name] for name in plan.missed_names)),
            damaged=tuple(sorted(self._damaged_steps.values())),
        )
        self._status = dataclasses.replace(status, error="", failures=0) if is_reachable else status
        # Forget deleted steps that the mirror would not keep either: a long run has many of them.
        local = self._copy_names.name_entries(self._steps)
        needed = {*local, *plan.missed_names, self._current_name}
        self._committed_summaries = {
            name: summary for name, summary in self._committed_summaries.items() if name in needed
        }
        fresh, self._missed_names = set(plan.missed_names) - self._missed_names, set(plan.missed_names)
        if fresh:
            self._notes.append(
                f"the run's retention deleted step(s) {', '.join(sorted(str(steps[name]) for name in fresh))} before "
                "they were copied to the mirror; keep more local steps, or save less often."
            )
        if plan.foreign_names and not self._has_noted_foreign:
            self._has_noted_foreign = True
            self._notes.append(
                f"{self.mirror.url} also holds {len(plan.foreign_names)} step(s) of another run, which stay there; "
                "give each run its own address."
            )

    def _record_failure(self, error: Exception) -> None:
        reason = error.what if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}."
        with self._condition:
            if not self._has_noted_failure:
                self._has_noted_failure = True
                self._notes.append(
                    f"the mirror is not up to date: {reason} Training continues, and the copy is retried."
                )
            self._status = dataclasses.replace(self._status, error=reason, failures=self._status.failures + 1)


def _link_files(entry: Entry, directory: pathlib.Path) -> pathlib.Path | None:
    """Hard-link the step's files into a directory that retention does not touch.

    Returns:
        The directory; the step itself if links are not possible; None if the step was deleted meanwhile.
    """
    files = [*(entry.manifest.summary.files if entry.manifest else ()), layout.MANIFEST]
    try:
        for file in files:
            (directory / file).parent.mkdir(parents=True, exist_ok=True)
            os.link(entry.path / file, directory / file)
        return directory
    except FileNotFoundError:
        return None if not entry.path.is_dir() else entry.path
    except OSError:
        return entry.path
