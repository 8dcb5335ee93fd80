# SPDX-License-Identifier: Apache-2.0
"""One step of a run, and all of them at one moment, as values."""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Literal

from ...errors import CheckpointError
from ...spec.retention import StepInfo
from ..manifest import Lineage, Manifest, Summary

type EntryState = Literal["committed", "unverified", "incomplete", "corrupt", "newer", "unreadable"]


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


def _get_sequence(entry: Entry) -> int:
    return entry.info.sequence if entry.info else 0
