# SPDX-License-Identifier: Apache-2.0
"""The list of a run's steps, derived from the steps alone.

No catalogue file can be lost or wrong, since every manifest records where its step belongs. `lineage` is
the list of branches that led to a step, each with the step after which it began. The newest commit's lineage is the
run's; a step of an earlier branch is superseded if it comes after the point where the next branch began. If the
newest commit is damaged, the second copy of its manifest gives its lineage: damage must not undo a rollback. After a
restore of a superseded step, the next save begins a branch there, and the earlier steps of that branch are live again.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal

from ..errors import CheckpointError, IncompleteStepError, StepDamagedError, StorageError, VersionError
from ..spec.retention import StepInfo
from . import commit, digest, late_metrics, layout
from .formats import foreign_layouts
from .manifest import Lineage, Manifest, Summary, read_sealed
from .manifest import read as read_manifest

_PIN_FILES = ("pins.json", "pins.second.json")
"""Stored twice: if the only list were damaged, retention would delete pinned steps."""

type EntryState = Literal["committed", "unverified", "incomplete", "corrupt", "newer", "unreadable"]


MAX_LISTINGS = 5
"""How often a reader lists the steps again because a writer has deleted all that it knew."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """One numbered directory of a run, or another program's checkpoint whose name ends in a number.

    Attributes:
        step: The number.
        path: The directory.
        state: "committed" if its manifest and the sizes of its files are right; "unverified" for another program's
            checkpoint; "newer" if a newer version wrote it; "unreadable" if the disk did not answer; otherwise the kind
            of its damage.
        info: What retention decides by; None unless committed.
        manifest: The manifest; None unless committed.
        spare_summary: The summary in the second copy of a damaged step; None if there is none.
        error: What is wrong with it; None if committed.
        fetch: Fetches a copy from the mirror to `path`; None for a local step.
        identity: Inode of the directory and when its entries last changed: another one may have got its name since, and
            even its inode. None if not known.
    """

    step: int
    path: pathlib.Path
    state: EntryState
    info: StepInfo | None = None
    manifest: Manifest | None = None
    spare_summary: Summary | None = None
    error: CheckpointError | None = None
    fetch: Callable[[], None] | None = None
    identity: tuple[int, int] | None = None

    @property
    def lineage(self) -> Lineage:
        """The branches that led to the step; empty if unknown."""
        summary = self.manifest.summary if self.manifest else self.spare_summary
        return summary.lineage if summary else ()


@dataclasses.dataclass(frozen=True)
class Catalogue:
    """All steps of a run at one moment, by step number.

    Attributes:
        entries: Every numbered directory, committed or not.
        moved_entries: Superseded steps whose number was needed again.
        last_sequence: The greatest commit number of any step, damaged ones included.
        lineage: The lineage of the run's last commit, even if that is damaged; empty for an empty run.
    """

    entries: tuple[Entry, ...]
    moved_entries: tuple[Entry, ...] = ()
    last_sequence: int = 0
    lineage: Lineage = ()

    @property
    def committed_entries(self) -> tuple[Entry, ...]:
        """The committed steps of all branches."""
        return tuple(entry for entry in (*self.entries, *self.moved_entries) if entry.state == "committed")

    @property
    def live_entries(self) -> tuple[Entry, ...]:
        """The committed steps of the run's branch."""
        return tuple(entry for entry in self.committed_entries if entry.info and not entry.info.superseded)

    @property
    def superseded_entries(self) -> tuple[Entry, ...]:
        """The committed steps that are not live."""
        return tuple(entry for entry in self.committed_entries if entry.info and entry.info.superseded)

    @property
    def newest_entry(self) -> Entry | None:
        """The live step that was committed last."""
        return max(self.live_entries, key=_get_sequence, default=None)

    @property
    def next_sequence(self) -> int:
        """The number that the next commit gets."""
        return 1 + max(self.last_sequence, *map(_get_sequence, self.committed_entries), 0)


def scan(root: pathlib.Path) -> Catalogue:
    """List the steps of a run; damaged steps are listed as such, never raised.

    Raises:
        StorageError: If the directory itself cannot be listed.
    """
    with commit.wrap_os_errors(f"{root} cannot be listed"):
        return add_metrics(_scan(root), late_metrics.read_files(root, late_metrics.list_names(root)))


def add_metrics(steps: Catalogue, files: late_metrics.LateMetricFiles) -> Catalogue:
    """Return the steps with the metrics that were recorded after their commits.

    A step with a damaged metrics file counts as pinned, since it may be the best.
    """
    if not files:
        return steps
    damaged = late_metrics.find_damaged(files)

    def add(entry: Entry) -> Entry:
        if entry.manifest is None or entry.info is None:
            return entry
        summary = late_metrics.merge(entry.manifest.summary, files)
        is_pinned = entry.info.pinned or late_metrics.get_key(summary) in damaged
        if summary is entry.manifest.summary and is_pinned == entry.info.pinned:
            return entry
        info = dataclasses.replace(entry.info, metrics=summary.metrics, pinned=is_pinned)
        return dataclasses.replace(entry, manifest=dataclasses.replace(entry.manifest, summary=summary), info=info)

    entries, moved = tuple(map(add, steps.entries)), tuple(map(add, steps.moved_entries))
    return dataclasses.replace(steps, entries=entries, moved_entries=moved)


def _scan(root: pathlib.Path) -> Catalogue:
    pins = read_pins(root)
    entries = _scan_directory(root)
    aside = [
        entry
        for entry in _scan_directory(layout.get_control_path(root, "superseded"), allow_suffix=True)
        if entry.manifest
    ]
    spares = list_spares(root)
    lineage = _find_damaged_lineage(root, entries, aside, spares) or _find_newest_lineage([*entries, *aside])
    entries = [*_add_spare_summaries(root, entries, aside, spares), *_find_foreign_steps(root, entries)]
    return _place_entries(Catalogue(tuple(entries), tuple(aside), max(spares, default=0), lineage), pins)


def were_deleted(candidates: Sequence[Entry]) -> bool:
    """Return whether all candidates were deleted since they were listed, as retention does beside a slow reader."""
    return bool(candidates) and not any(each.fetch is not None or os.path.lexists(each.path) for each in candidates)


def add_step(steps: Catalogue, path: pathlib.Path, pins: frozenset[int]) -> Catalogue:
    """Return a catalogue after the commit of one step, without reading the other steps again."""
    step = int(path.name)
    if any(entry.step == step for entry in steps.entries):
        # A superseded step in its place was moved aside: rare, so the directories are read again.
        return scan(path.parent)
    examined = _examine_path(path, step)
    entries = sorted([*steps.entries, *([examined] if examined else [])], key=lambda entry: entry.step)
    lineage = _find_newest_lineage([*entries, *steps.moved_entries])
    return _place_entries(dataclasses.replace(steps, entries=tuple(entries), lineage=lineage), pins)


def _add_spare_summaries(
    root: pathlib.Path, entries: Sequence[Entry], moved_entries: Sequence[Entry], spares: Sequence[int]
) -> list[Entry]:
    """Return the entries, damaged ones with the summary from their second copy unless a committed step has it."""
    committed = {entry.manifest.summary.sequence for entry in (*entries, *moved_entries) if entry.manifest}
    damaged = {entry.step: entry for entry in entries if entry.state in ("incomplete", "corrupt")}
    found: dict[int, Summary] = {}
    for number in spares if damaged else ():
        with contextlib.suppress(StepDamagedError, VersionError, OSError):
            summary = read_sealed(layout.get_spare_directory(root, number)).summary
            if number not in committed and summary.step in damaged:
                found.setdefault(summary.step, summary)  # The newest first: an older one was deleted or quarantined.
    return [
        dataclasses.replace(entry, spare_summary=found[entry.step])
        if entry.step in found and not entry.manifest
        else entry
        for entry in entries
    ]


def _place_entries(steps: Catalogue, pins: frozenset[int]) -> Catalogue:
    """Return a catalogue whose entries record whether they are live and pinned."""
    entries = _add_step_infos(steps.entries, pins, steps.lineage)
    live = {entry.step for entry in entries if entry.info and not entry.info.superseded}
    moved = _add_step_infos(steps.moved_entries, pins, steps.lineage)
    return dataclasses.replace(
        steps,
        entries=tuple(entries),
        moved_entries=tuple(_mark_superseded(entry) if entry.step in live else entry for entry in moved),
    )


def is_damaged_now(entry: Entry) -> bool:
    """Return whether the manifest or the files' sizes of a committed step have been damaged since it was listed."""
    examined = _examine_path(entry.path, entry.step)
    return examined is None or examined.state != entry.state


def is_still_damaged(entry: Entry) -> bool:
    """Return whether a step that was found damaged is still in its place: not deleted, repaired or replaced since.

    Another process may have saved the step again, or fetched an intact copy of it, while this one read it.
    """
    found = _examine_path(entry.path, entry.step)
    if found is None or found.manifest is None:
        return found is not None and found.state in ("incomplete", "corrupt")
    if entry.manifest is None or entry.identity != found.identity:
        return False
    # Bytes can be damaged under an intact manifest. Metrics do not count: they may have been recorded since.
    before, now = (dataclasses.replace(each.manifest.summary, metrics={}) for each in (entry, found) if each.manifest)
    return before == now


def is_intact_again(entry: Entry) -> bool:
    """Return whether a step that was found damaged has been repaired or replaced by another one since."""
    found = _examine_path(entry.path, entry.step)
    return found is not None and found.manifest is not None and not is_still_damaged(entry)


def _scan_directory(directory: pathlib.Path, *, allow_suffix: bool = False) -> list[Entry]:
    if not directory.is_dir():
        return []
    entries = []
    for path in directory.iterdir():
        step = layout.parse_step_number(path.name.partition("-")[0] if allow_suffix else path.name)
        if step is not None and (entry := _examine_path(path, step)) is not None:
            entries.append(entry)
    return sorted(entries, key=lambda entry: entry.step)


def _find_foreign_steps(root: pathlib.Path, entries: Sequence[Entry]) -> Iterator[Entry]:
    """Yield the checkpoints of other programs whose names are not plain numbers, such as `ckpt_10` and `000010`."""
    known = {entry.step for entry in entries}
    for step, path in foreign_layouts.find_foreign_files(root).steps:
        # An adopted flax file stays beside the step with its number.
        if not (path.is_file() and step in known):
            yield make_foreign_entry(path, step)


def make_foreign_entry(path: pathlib.Path, step: int) -> Entry:
    """Return the entry of another program's checkpoint."""
    error = IncompleteStepError(
        what=f"foreign: {path.name} was written by {foreign_layouts.describe_writer(path)}",
        why="it has no manifest, so nothing about it can be verified.",
        fix=f"ct.adopt({str(path.parent)!r}) adds one; ct.load also reads the step without a manifest.",
    )
    return Entry(step=step, path=path, state="unverified", error=error)


def examine_step(path: pathlib.Path, step: int) -> Entry:
    """Return the entry of one step from its directory alone, wherever that was copied to."""
    entry = _examine_path(path, step)
    if entry is None or entry.manifest is None:
        return entry or make_foreign_entry(path, step)
    return _add_step_infos([entry], frozenset(), entry.manifest.summary.lineage)[0]


def _examine_path(path: pathlib.Path, step: int) -> Entry | None:
    """Return the entry of a numbered directory, or of a link to one; None if the path is neither."""
    try:
        if path.is_symlink() and not path.exists():
            # It must stay listed: otherwise a run whose only step is linked would start from scratch.
            return Entry(step=step, path=path, state="unreadable", error=_make_dangling_error(path))
        return _examine_directory(path, step) if path.is_dir() else None
    except OSError as error:
        # One bad sector must not hide the other steps; restoring this one raises.
        failure = StorageError(
            what=f"step {step} cannot be read: {error}.",
            why="that is the disk or its permissions, not damage: an older step would fail in the same way.",
            fix="fix the cause and restore again, or restore(step=...) an older step by its number.",
        )
        return Entry(step=step, path=path, state="unreadable", error=failure)


def _examine_directory(path: pathlib.Path, step: int) -> Entry:
    try:
        status = path.stat()  # Before the manifest: if the directory is replaced in between, they do not fit.
        identity = (status.st_ino, status.st_mtime_ns)
        return Entry(step=step, path=path, state="committed", manifest=read_manifest(path), identity=identity)
    except IncompleteStepError as error:
        lacks_manifest = not (path / layout.MANIFEST).exists()
        if lacks_manifest and foreign_layouts.recognize(path) and not _has_spare_manifest(path.parent, step):
            return make_foreign_entry(path, step)
        return Entry(step=step, path=path, state="incomplete", error=error)
    except VersionError as error:
        return Entry(step=step, path=path, state="newer", error=error)
    except StepDamagedError as error:
        return Entry(step=step, path=path, state="corrupt", error=error)


def _make_dangling_error(path: pathlib.Path) -> StorageError:
    return StorageError(
        what=f"step {path.name} is a link to {path.readlink()}, which does not exist.",
        why="the step was moved, most likely to a disk that is not mounted; that is not damage.",
        fix=f"mount that disk, or remove the link {path} if the step is gone; restore(step=...) restores another one.",
    )


def _has_spare_manifest(root: pathlib.Path, step: int) -> bool:
    """Return whether a step without a manifest once had one: plain Orbax steps have no second copy."""
    spares = layout.get_control_path(root, "spare")
    for spare in spares.iterdir() if spares.is_dir() else ():
        with contextlib.suppress(StepDamagedError, VersionError, OSError):
            if read_sealed(spare).summary.step == step:
                return True
    return False


def list_spares(root: pathlib.Path) -> list[int]:
    """Return the numbers of the commits that have second copies, newest first."""
    spares = layout.get_control_path(root, "spare")
    names = [path.name for path in spares.iterdir()] if spares.is_dir() else []
    return sorted((number for name in names if (number := layout.parse_step_number(name)) is not None), reverse=True)


def _find_newest_lineage(entries: Iterable[Entry]) -> Lineage:
    summaries = [entry.manifest.summary for entry in entries if entry.manifest]
    return max(summaries, key=lambda summary: summary.sequence).lineage if summaries else ()


def _find_damaged_lineage(
    root: pathlib.Path, entries: Sequence[Entry], moved_entries: Sequence[Entry], spares: Sequence[int]
) -> Lineage:
    """Return the lineage of a damaged step that was committed after all intact ones; empty if there is none."""
    newest = max((entry.manifest.summary.sequence for entry in (*entries, *moved_entries) if entry.manifest), default=0)
    quarantined = layout.get_control_path(root, "quarantine")
    names = [path.name.partition("-")[0] for path in quarantined.iterdir()] if quarantined.is_dir() else []
    damaged = {entry.step for entry in entries if not entry.manifest} | set(map(layout.parse_step_number, names))
    for number in spares:
        if number <= newest:
            break
        with contextlib.suppress(StepDamagedError, VersionError, OSError):
            summary = read_sealed(layout.get_spare_directory(root, number)).summary
            if summary.step in damaged:
                return summary.lineage
    return ()


def _add_step_infos(entries: Iterable[Entry], pins: frozenset[int], lineage: Lineage) -> list[Entry]:
    placed = []
    for entry in entries:
        if entry.manifest:
            summary = entry.manifest.summary
            info = StepInfo(
                step=summary.step,
                sequence=summary.sequence,
                saved_at=summary.saved_at,
                metrics=summary.metrics,
                # Nothing outside the run is deleted, so a linked step is kept.
                pinned=summary.step in pins or (entry.fetch is None and entry.path.is_symlink()),
                superseded=not is_live(summary, lineage),
            )
            entry = dataclasses.replace(entry, info=info)
        placed.append(entry)
    return placed


def _mark_superseded(entry: Entry) -> Entry:
    return dataclasses.replace(entry, info=dataclasses.replace(entry.info, superseded=True)) if entry.info else entry


def is_live(summary: Summary, lineage: Lineage) -> bool:
    """Return whether a step belongs to a lineage: on one of its branches, and not after that branch ended."""
    branch = summary.lineage[-1][0]
    for index, (name, _) in enumerate(lineage):
        if name == branch:
            left_at = lineage[index + 1][1] if index + 1 < len(lineage) else None
            return left_at is None or summary.step <= left_at
    return False


def _get_sequence(entry: Entry) -> int:
    return entry.info.sequence if entry.info else 0


def read_pins(root: pathlib.Path) -> frozenset[int]:
    """Return the pinned steps, from whichever of the two lists is intact; none if neither is."""
    found = (_read_pin_file(layout.get_control_path(root, name)) for name in _PIN_FILES)
    return next((pins for pins in found if pins is not None), frozenset())


def _read_pin_file(path: pathlib.Path) -> frozenset[int] | None:
    """Return the steps of one list of pins; None if it is missing or damaged."""
    try:
        data = json.loads(path.read_bytes())
        steps = data["steps"]
        whole = digest.hash_bytes("xxh3", json.dumps(steps).encode()) == data["digest"]
        return frozenset(steps) if whole and all(type(step) is int for step in steps) else None
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None


def has_intact_pins(root: pathlib.Path) -> bool:
    """Return whether both lists of pins are intact and equal, or neither exists."""
    paths = [layout.get_control_path(root, name) for name in _PIN_FILES]
    first, second = map(_read_pin_file, paths)
    return first == second and (first is not None or not any(path.exists() for path in paths))


def write_pins(root: pathlib.Path, pins: frozenset[int]) -> None:
    """Replace the list of pinned steps, durably, and then its second copy."""
    commit.require_confined(root)
    steps = sorted(pins)
    mark = digest.hash_bytes("xxh3", json.dumps(steps).encode())
    for name in _PIN_FILES:
        commit.write_file(layout.get_control_path(root, name), json.dumps({"steps": steps, "digest": mark}).encode())
