# SPDX-License-Identifier: Apache-2.0
"""`ls`: list the steps of a run with metrics, sizes and branches."""

import dataclasses
import os
import time
from collections.abc import Iterable, Sequence

from remattools.text import format_bytes, format_table

from ..sources.open_source import Location, open_source
from ..store import catalogue


@dataclasses.dataclass(frozen=True, kw_only=True)
class ListedStep:
    """One row of `ls`.

    Attributes:
        step: Its number.
        state: "committed", "superseded", "unverified", "incomplete", "corrupt", "unreadable" (the disk does not answer)
            or "newer" (written by a newer version of this package).
        branch: Name of its branch; "" if unknown.
        began_after: The step after which the branch began; 0 for the start of the run.
        lineage: The branches that led to the step, each with the step after which it began; the last is `branch`.
        saved_at: Seconds since the epoch.
        total_bytes: Bytes of its files.
        metrics: Recorded metrics.
        reason: Why it was saved, or what is wrong with it.
        pinned: Whether it is pinned.

    Example:
        >>> import tempfile, ckpttools as ct
        >>> spec = ct.CheckpointSpec(directory=tempfile.mkdtemp())
        >>> with ct.open(spec) as ckpt:
        ...     saved = ckpt.save(1, {"count": 1}, metrics={"loss": 0.5})
        >>> step = ct.ls(spec.directory)[0]
        >>> step.step, step.state, step.metrics
        (1, 'committed', {'loss': 0.5})
    """

    step: int
    state: str
    branch: str = ""
    began_after: int = 0
    saved_at: float = 0.0
    total_bytes: int = 0
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)
    reason: str = ""
    pinned: bool = False
    lineage: tuple[tuple[str, int], ...] = ()


class Listing(tuple[ListedStep, ...]):
    """A tuple of `ListedStep` that prints as the table of `ckpttools ls`.

    Attributes:
        found: What the location is, as a sentence, if it has no steps; "" otherwise.

    Example:
        >>> import ckpttools as ct
        >>> listing = ct.Listing([ct.ListedStep(step=500, state="committed", metrics={"loss": 0.5})])
        >>> str(listing).splitlines()[1].split()
        ['500', 'committed', '0.5']
    """

    found: str

    def __new__(cls, steps: Iterable[ListedStep] = (), found: str = "") -> "Listing":
        """Return a listing of steps."""
        listing = super().__new__(cls, steps)
        listing.found = "" if listing else found
        return listing

    def __str__(self) -> str:
        columns, rows = make_rows(self)
        return format_table(columns, rows, numeric=find_numeric_columns(columns)) if self else f"no steps: {self.found}"


def make_rows(steps: Sequence[ListedStep]) -> tuple[list[str], list[list[str]]]:
    """Return the titles and rows of the table of steps; each metric has a column."""
    names = sorted({name for step in steps for name in step.metrics})
    rows = [
        [
            str(step.step),
            step.state + (", pinned" if step.pinned else ""),
            time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(step.saved_at)) if step.saved_at else "",
            format_bytes(step.total_bytes) if step.total_bytes else "",
            *(f"{step.metrics[name]:.6g}" if name in step.metrics else "" for name in names),
            f"{step.branch} after {step.began_after}" if step.began_after else step.branch,
            step.reason,
        ]
        for step in steps
    ]
    return ["step", "state", "saved", "size", *names, "branch", "reason"], rows


def find_numeric_columns(columns: Sequence[str]) -> list[str]:
    """Return the titles of the numeric columns of `make_rows`."""
    return [columns[0], *columns[3:-2]]


def ls(directory: Location) -> Listing:
    """List every step of a run in commit order, damaged and foreign ones last; reads only manifests.

    Args:
        directory: The directory of a run or of one step, or a mirror or its address.

    Returns:
        A tuple of `ListedStep`, which prints as a table.

    Raises:
        NotARunError: If the directory does not exist, or is a file or part of a step.
        MirrorError: If a mirror does not answer.

    Example:
        >>> import tempfile
        >>> import ckpttools as ct
        >>> run = tempfile.mkdtemp()
        >>> with ct.open(ct.CheckpointSpec(directory=run, storage=ct.Storage(asynchronous=False))) as ckpt:
        ...     saved = [ckpt.save(step, {"count": step}) for step in (1, 2)]
        >>> [(step.step, step.state) for step in ct.ls(run)]
        [(1, 'committed'), (2, 'committed')]
    """
    with open_source(directory) as source:
        pass
    entries = sorted(
        source.all_entries,
        key=lambda entry: (entry.info is None, entry.info.sequence if entry.info else entry.step),
    )
    # A step that its own process is deleting at this moment looks damaged; it is about to vanish.
    listed = [
        _make_listed_step(entry) for entry in entries if entry.state == "committed" or os.path.lexists(entry.path)
    ]
    return Listing(listed, source.text)


def _make_listed_step(entry: catalogue.Entry) -> ListedStep:
    branch, began_after = entry.lineage[-1] if entry.lineage else ("", 0)
    if entry.manifest is None or entry.info is None:
        return ListedStep(
            step=entry.step,
            state=entry.state,
            branch=branch,
            began_after=began_after,
            reason=entry.error.what if entry.error else "",
            lineage=entry.lineage,
        )
    summary = entry.manifest.summary
    return ListedStep(
        step=entry.step,
        state="superseded" if entry.info.superseded else "committed",
        branch=branch,
        began_after=began_after,
        saved_at=summary.saved_at,
        total_bytes=summary.total_bytes,
        metrics=dict(summary.metrics),
        reason=summary.reason,
        pinned=entry.info.pinned,
        lineage=summary.lineage,
    )
