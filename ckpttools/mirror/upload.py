# SPDX-License-Identifier: Apache-2.0
"""Every committed step to its mirror, in the background, whatever the store does.

One thread compares what the run holds with what the mirror holds and copies what is missing, the newest first. It is
woken by each commit, and by itself while the store does not answer, so that nothing has to be remembered: a session
that begins after a failure finds the same differences and mends them.

Nothing here is raised into the training. What went wrong is kept as notes, which the session gives as warnings.
"""

import contextlib
import dataclasses
import os
import pathlib
import shutil
import threading
from collections.abc import Iterable, Mapping
from typing import Any

from ..errors import CheckpointError, SpecError, StepDamagedError
from ..spec import retention
from ..spec.mirror import Mirror
from ..spec.retention import Retention, StepInfo
from ..store import catalogue, layout
from ..store.catalogue import Catalogue, Entry
from ..store.manifest import Lineage, Summary
from .remote import RemoteStore, get_copy_name

type Pins = frozenset[int]

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 60.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class MirrorStatus:
    """How far the mirror is.

    Attributes:
        url: Its address.
        copied: Steps that are complete there, as far as is known.
        pending: Steps that are still to be copied.
        missed: Steps that the run deleted before they could be copied.
        damaged: Steps that were not copied because their local files are damaged.
        error: What the store said last; "" if it answered.
        failures: How many tries in a row have failed.
    """

    url: str
    copied: tuple[int, ...] = ()
    pending: tuple[int, ...] = ()
    missed: tuple[int, ...] = ()
    damaged: tuple[int, ...] = ()
    error: str = ""
    failures: int = 0

    @property
    def ok(self) -> bool:
        """Whether the store answers and nothing is missing there."""
        return not (self.error or self.pending or self.missed or self.damaged)

    def as_dict(self) -> dict[str, Any]:
        """The status as plain data."""
        return {"ok": self.ok, **dataclasses.asdict(self)}

    def __str__(self) -> str:
        parts = [f"{self.url}: {len(self.copied)} step(s) copied"]
        for name in ("pending", "missed", "damaged"):
            steps = getattr(self, name)
            parts += [f"{name} {', '.join(map(str, steps))}"] if steps else []
        return "; ".join([*parts, *([self.error] if self.error else [])])


@dataclasses.dataclass(frozen=True)
class SyncPlan:
    """What would bring a mirror up to date.

    Attributes:
        names_to_copy: Names of the local steps that are missing there, the newest first.
        names_to_delete: Names of copies that the mirror's retention does not keep, and of unfinished ones.
        missed_names: Names of steps that it would keep, and that are neither there nor here any more.
        foreign_names: Names of copies of another run, which are never touched.
    """

    names_to_copy: tuple[str, ...]
    names_to_delete: tuple[str, ...]
    missed_names: tuple[str, ...]
    foreign_names: tuple[str, ...]


def require_outside_run(root: pathlib.Path, mirror: Mirror) -> None:
    """Raise `SpecError` if a mirror lies in the folder of its run.

    Args:
        root: The run's folder.
        mirror: The mirror.
    """
    place = mirror.url.removeprefix("file://").removeprefix("local://")
    if "://" not in place and "::" not in place and pathlib.Path(place).resolve().is_relative_to(root.resolve()):
        raise SpecError(
            what=f"the mirror {mirror.url} lies in the folder of its run, {root}.",
            why="what takes the run away would take its copies along.",
            fix="an address on another disk or in a store, such as s3://bucket/run.",
        )


type NamedSummaries = Mapping[str, Summary]


def make_sync_plan(
    local: NamedSummaries,
    copies: NamedSummaries,
    names: Iterable[str],
    keep: Retention,
    *,
    lineage: Lineage,
    deleted: NamedSummaries,
    pins: Pins,
) -> SyncPlan:
    """Compare a run with its mirror.

    Args:
        local: The run's steps, by the names of their copies.
        copies: The finished copies.
        names: All names at the mirror, also of unfinished copies.
        keep: The mirror's retention, which decides over the steps of both places.
        lineage: That of the run.
        deleted: Steps that were committed here, and deleted again.
        pins: Steps that are pinned.
    """
    run = lineage[0][0] if lineage else ""
    foreign = tuple(name for name, summary in copies.items() if run and summary.lineage[0][0] != run)
    ours = {name: summary for name, summary in copies.items() if name not in foreign}
    both = _make_step_infos({**ours, **local}, lineage, pins)
    wanted = _select_kept(both, keep)
    all_ever = _select_kept(_make_step_infos({**deleted, **ours, **local}, lineage, pins), keep)
    unfinished = [name for name in names if name not in copies and name not in wanted]
    return SyncPlan(
        names_to_copy=tuple(
            sorted((name for name in wanted if name not in copies), key=lambda name: -both[name].sequence)
        ),
        names_to_delete=(*(name for name in ours if name not in wanted), *unfinished),
        missed_names=tuple(name for name in deleted if name in all_ever and name not in copies and name not in local),
        foreign_names=foreign,
    )


def _make_step_infos(summaries: NamedSummaries, lineage: Lineage, pins: Pins) -> dict[str, StepInfo]:
    """What retention may know of steps from two places, numbered by the time of their commits."""
    ordered = sorted(summaries.items(), key=lambda pair: (pair[1].saved_at, pair[1].sequence))
    return {
        name: StepInfo(
            step=summary.step,
            sequence=number,
            saved_at=summary.saved_at,
            metrics=summary.metrics,
            pinned=summary.step in pins,
            superseded=not catalogue.is_live(summary, lineage),
        )
        for number, (name, summary) in enumerate(ordered, start=1)
    }


def _select_kept(infos: Mapping[str, StepInfo], keep: Retention) -> set[str]:
    verdicts = retention.decide_retention(keep, list(infos.values()), newest_verified=None)
    kept = {verdict.step.sequence for verdict in verdicts if verdict.keep}
    return {name for name, info in infos.items() if info.sequence in kept}


class CopyNames:
    """The names under which the steps of a run are copied; each manifest is read once."""

    def __init__(self) -> None:
        self._names: dict[tuple[int, int, float], str] = {}

    def name_entries(self, steps: Catalogue) -> dict[str, Entry]:
        """The steps that are on the disk now, by name."""
        found, names = {}, {}
        for entry in steps.committed_entries:
            summary = entry.manifest.summary if entry.manifest else None
            path = entry.path / layout.MANIFEST
            if summary is None or not path.is_file():
                continue
            key = summary.step, summary.sequence, summary.saved_at
            with contextlib.suppress(OSError, StepDamagedError):
                names[key] = self._names[key] if key in self._names else get_copy_name(path.read_bytes())
                found[names[key]] = entry
        self._names = names
        return found


def get_summaries(entries: Mapping[str, Entry]) -> dict[str, Summary]:
    """The summaries of committed steps."""
    return {name: entry.manifest.summary for name, entry in entries.items() if entry.manifest}


class MirrorUploader:
    """The thread that keeps a mirror up to date, from the first `update` to `close`.

    Attributes:
        mirror: The mirror of the spec.
        store: Its store; nothing is reached before the first `update`.
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
        self._notes: list[str] = []

    @property
    def status(self) -> MirrorStatus:
        """How far the mirror is."""
        with self._condition:
            return self._status

    def take_notes(self) -> list[str]:
        """What went wrong since the last call, each thing once."""
        with self._condition:
            notes, self._notes = self._notes, []
        return notes

    def update(self, steps: Catalogue) -> None:
        """Take note of a commit, or of the steps that the run had when it was opened."""
        with self._condition:
            self._steps, self._version = steps, self._version + 1
            if not self._copied_summaries:
                # A restore has asked the store already.
                self._copied_summaries = self.store.known_summaries
            self._committed_summaries |= get_summaries(self._copy_names.name_entries(steps))
            self._update_status(self._make_plan(self._copied_summaries))
            if self._thread is None:
                # A daemon: a store that hangs must not keep the process from ending.
                self._thread = threading.Thread(target=self._run, name="ckpttools-mirror", daemon=True)
                self._thread.start()
            self._condition.notify_all()

    def close(self) -> None:
        """Wait for the copies, for as long as the mirror says; what is left is left for the next session."""
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
                # Whatever a driver or the disk does, the training goes on; the next round begins anew.
                self._record_failure(error)
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
            done = version
            if closing:
                return

    def _sync(self) -> None:
        # That the store lists and reads is no answer yet to what it is asked for: it may refuse to be written.
        took = False
        while True:
            names = self.store.list_names()
            found = {name: summary for name in names if (summary := self.store.read_summary(name))}
            with self._condition:
                local = self._copy_names.name_entries(self._steps)
                todo = self._make_plan(found, names)
                self._copied_summaries = found
                self._update_status(todo, is_reachable=took)
            name = next((name for name in todo.names_to_copy if name not in self._damaged_steps), None)
            if name is None:
                for name in todo.names_to_delete:
                    self.store.delete(name)
                with self._condition:
                    self._copied_summaries = {
                        name: copy for name, copy in found.items() if name not in todo.names_to_delete
                    }
                    self._update_status(todo, is_reachable=True)
                    self._has_noted_failure = False
                return
            took = self._upload(name, local[name]) or took

    def _make_plan(self, copies: NamedSummaries, names: Iterable[str] = ()) -> SyncPlan:
        local = get_summaries(self._copy_names.name_entries(self._steps))
        gone = {
            name: summary
            for name, summary in self._committed_summaries.items()
            if name not in {*local, self._current_name}
        }
        pins = catalogue.read_pins(self._root)
        return make_sync_plan(local, copies, names, self._keep, lineage=self._steps.lineage, deleted=gone, pins=pins)

    def _upload(self, name: str, entry: Entry) -> bool:
        """Copy one step from links to its files, so that retention cannot take them away half way.

        Returns:
            Whether the store took it; False if the step is gone or damaged here.
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

    def _update_status(self, plan: SyncPlan, *, is_reachable: bool = False) -> None:
        """Write down how far the mirror is, and note what was missed; with the lock held."""
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
        # What is gone, and what the mirror would not keep either, is forgotten: a long run has many such steps.
        here = self._copy_names.name_entries(self._steps)
        needed = {*here, *plan.missed_names, self._current_name}
        self._committed_summaries = {
            name: summary for name, summary in self._committed_summaries.items() if name in needed
        }
        fresh, self._missed_names = set(plan.missed_names) - self._missed_names, set(plan.missed_names)
        if fresh:
            self._notes.append(
                f"the run's retention deleted step(s) {', '.join(sorted(str(steps[name]) for name in fresh))} before "
                "they were copied to the mirror; keep more steps here, or save less often."
            )
        if plan.foreign_names and not self._has_noted_foreign:
            self._has_noted_foreign = True
            self._notes.append(
                f"{self.mirror.url} also holds {len(plan.foreign_names)} step(s) of another run, which are left alone; "
                "give each run an address of its own."
            )

    def _record_failure(self, error: Exception) -> None:
        text = error.what if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}."
        with self._condition:
            if not self._has_noted_failure:
                self._has_noted_failure = True
                self._notes.append(f"the mirror is not up to date: {text} The training goes on; it is tried again.")
            self._status = dataclasses.replace(self._status, error=text, failures=self._status.failures + 1)


def _link_files(entry: Entry, directory: pathlib.Path) -> pathlib.Path | None:
    """The step's files under second names, which no retention knows; the step itself where links are not possible.

    None if the step was deleted meanwhile.
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
