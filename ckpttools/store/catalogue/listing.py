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
import pathlib
from collections.abc import Iterable, Iterator, Sequence

from ...errors import StepDamagedError, VersionError
from ...spec.retention import StepInfo
from .. import commit, late_metrics, layout
from ..formats import foreign_layouts
from ..manifest import Lineage, Summary, read_sealed
from .entries import Catalogue, Entry
from .examine import examine_path, make_foreign_entry
from .pins import read_pins

MAX_LISTINGS = 5
"""How often a reader lists the steps again because a writer has deleted all that it knew."""


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


def add_step(steps: Catalogue, path: pathlib.Path, pins: frozenset[int]) -> Catalogue:
    """Return a catalogue after the commit of one step, without reading the other steps again."""
    step = int(path.name)
    if any(entry.step == step for entry in steps.entries):
        # A superseded step in its place was moved aside: rare, so the directories are read again.
        return scan(path.parent)
    examined = examine_path(path, step)
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


def _scan_directory(directory: pathlib.Path, *, allow_suffix: bool = False) -> list[Entry]:
    if not directory.is_dir():
        return []
    entries = []
    for path in directory.iterdir():
        step = layout.parse_step_number(path.name.partition("-")[0] if allow_suffix else path.name)
        if step is not None and (entry := examine_path(path, step)) is not None:
            entries.append(entry)
    return sorted(entries, key=lambda entry: entry.step)


def _find_foreign_steps(root: pathlib.Path, entries: Sequence[Entry]) -> Iterator[Entry]:
    """Yield the checkpoints of other programs whose names are not plain numbers, such as `ckpt_10` and `000010`."""
    known = {entry.step for entry in entries}
    for step, path in foreign_layouts.find_foreign_files(root).steps:
        # An adopted flax file stays beside the step with its number.
        if not (path.is_file() and step in known):
            yield make_foreign_entry(path, step)


def examine_step(path: pathlib.Path, step: int) -> Entry:
    """Return the entry of one step from its directory alone, wherever that was copied to."""
    entry = examine_path(path, step)
    if entry is None or entry.manifest is None:
        return entry or make_foreign_entry(path, step)
    return _add_step_infos([entry], frozenset(), entry.manifest.summary.lineage)[0]


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
