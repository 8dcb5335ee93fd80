# SPDX-License-Identifier: Apache-2.0
"""Put the steps of a run and their copies at a mirror in one order, for choosing among them.

Whether a copy belongs to the run's current branch is judged by the local steps, as long as there are any. On one branch
a later step is saved later, so a copy with a greater number that was saved earlier is on a superseded branch.
"""

import dataclasses
from collections.abc import Sequence

from ..spec.retention import StepInfo
from ..store import catalogue
from ..store.catalogue import Catalogue, Entry
from ..store.manifest import Lineage, Summary
from .remote_store import Copy


def merge_copies(steps: Catalogue, copies: Sequence[tuple[Copy, Entry]]) -> Catalogue:
    """Return the steps of a run and their copies as one catalogue, local steps before their copies.

    Args:
        steps: The run's steps.
        copies: Finished copies, each with the entry that fetches it.
    """
    newest = steps.newest_entry.manifest.summary if steps.newest_entry and steps.newest_entry.manifest else None
    last = max((copy.manifest.summary for copy, _ in copies), key=lambda summary: summary.saved_at, default=None)
    lineage = _choose_lineage(steps.lineage, newest, last)
    placed = []
    for entry in (*steps.entries, *steps.moved_entries):
        placed.append((entry, entry.manifest is not None and catalogue.is_live(entry.manifest.summary, lineage)))
    for _, entry in copies:
        if entry.manifest is not None:
            placed.append((entry, _is_live_copy(entry.manifest.summary, lineage, newest)))
    # A local step and its copy have equal metrics: the greater number puts the local one first.
    order_of_commit = sorted(
        (entry for entry, _ in placed if entry.manifest),
        key=lambda entry: (entry.manifest.summary.saved_at if entry.manifest else 0.0, entry.fetch is None),
    )
    number = {entry.path: index for index, entry in enumerate(order_of_commit, start=1)}
    return Catalogue(
        tuple(_renumber(entry, live, number.get(entry.path, 0)) for entry, live in placed), lineage=lineage
    )


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


def _choose_lineage(local: Lineage, newest_local: Summary | None, newest_copy: Summary | None) -> Lineage:
    """Return the run's lineage: the local one, unless the run continued on another machine.

    The local lineage is known even if all steps of its last branch are damaged.
    """
    if newest_copy is None:
        return local
    continued_elsewhere = newest_copy.lineage[: len(local)] == local and (
        newest_local is None or newest_copy.saved_at > newest_local.saved_at
    )
    return newest_copy.lineage if continued_elsewhere else local


def _is_live_copy(summary: Summary, lineage: Lineage, newest: Summary | None) -> bool:
    left_behind = newest is not None and summary.step > newest.step and summary.saved_at < newest.saved_at
    return catalogue.is_live(summary, lineage) and not left_behind
