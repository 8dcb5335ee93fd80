# SPDX-License-Identifier: Apache-2.0
"""Decide what a mirror lacks, what it may delete, and what it has missed, by comparing it with its run.

Nothing is remembered between two plans: after a failure the next plan finds the same differences again.
"""

import contextlib
import dataclasses
import pathlib
from collections.abc import Iterable, Mapping

from ..errors import SpecError, StepDamagedError
from ..spec import retention
from ..spec.mirror import Mirror
from ..spec.retention import Retention, StepInfo
from ..store import catalogue, layout
from ..store.catalogue import Catalogue, Entry
from ..store.manifest import Lineage, Summary
from .remote_store import get_copy_name

type Pins = frozenset[int]


type NamedSummaries = Mapping[str, Summary]


@dataclasses.dataclass(frozen=True)
class UploadPlan:
    """What brings a mirror up to date.

    Attributes:
        names_to_copy: Names of the local steps that the mirror lacks, the newest first.
        names_to_delete: Names of copies that the mirror's retention does not keep, and of unfinished ones.
        missed_names: Names of steps that it would keep, but that exist neither there nor here any more.
        foreign_names: Names of copies of another run, which are never touched.
    """

    names_to_copy: tuple[str, ...]
    names_to_delete: tuple[str, ...]
    missed_names: tuple[str, ...]
    foreign_names: tuple[str, ...]


def make_upload_plan(
    local: NamedSummaries,
    copies: NamedSummaries,
    names: Iterable[str],
    keep: Retention,
    *,
    lineage: Lineage,
    deleted: NamedSummaries,
    pins: Pins,
) -> UploadPlan:
    """Decide what to copy to a mirror and what to delete there.

    Args:
        local: The run's steps, by the names that their copies have.
        copies: The finished copies.
        names: All names at the mirror, including unfinished copies.
        keep: The mirror's retention, applied to the steps of both places.
        lineage: The run's lineage.
        deleted: Steps that were committed here and deleted since.
        pins: Numbers of the pinned steps.
    """
    run = lineage[0][0] if lineage else ""
    foreign = tuple(name for name, summary in copies.items() if run and summary.lineage[0][0] != run)
    ours = {name: summary for name, summary in copies.items() if name not in foreign}
    both = _make_step_infos({**ours, **local}, lineage, pins)
    kept = _select_kept(both, keep)
    ever_kept = _select_kept(_make_step_infos({**deleted, **ours, **local}, lineage, pins), keep)
    unfinished = [name for name in names if name not in copies and name not in kept]
    return UploadPlan(
        names_to_copy=tuple(
            sorted((name for name in kept if name not in copies), key=lambda name: -both[name].sequence)
        ),
        names_to_delete=(*(name for name in ours if name not in kept), *unfinished),
        missed_names=tuple(name for name in deleted if name in ever_kept and name not in copies and name not in local),
        foreign_names=foreign,
    )


def _make_step_infos(summaries: NamedSummaries, lineage: Lineage, pins: Pins) -> dict[str, StepInfo]:
    """Return what retention sees of steps from two places, numbered in the order of their commits."""
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
    """Names the copies of a run's steps; reads each manifest once."""

    def __init__(self) -> None:
        self._names: dict[tuple[int, int, float], str] = {}

    def name_entries(self, steps: Catalogue) -> dict[str, Entry]:
        """Return the steps that are on disk now, by the names of their copies."""
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
    """Return the summaries of committed steps."""
    return {name: entry.manifest.summary for name, entry in entries.items() if entry.manifest}


def require_outside_run(root: pathlib.Path, mirror: Mirror) -> None:
    """Raise `SpecError` if a mirror lies inside the directory of its run.

    Args:
        root: The run directory.
        mirror: The mirror.
    """
    place = mirror.url.removeprefix("file://").removeprefix("local://")
    if "://" not in place and "::" not in place and pathlib.Path(place).resolve().is_relative_to(root.resolve()):
        raise SpecError(
            what=f"the mirror {mirror.url} lies inside the directory of its run, {root}.",
            why="whatever deletes the run would delete its copies too.",
            fix='an address on another disk or in a store, such as ct.Mirror("s3://bucket/run").',
        )
