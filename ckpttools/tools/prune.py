# SPDX-License-Identifier: Apache-2.0
"""`prune`: delete the steps that a retention value does not keep, or the damaged steps in quarantine."""

import contextlib
import os

from ..spec.retention import Retention, Verdict
from ..store.run_directory import RunDirectory, require_run_directory


def prune(directory: str | os.PathLike[str], keep: Retention, *, dry_run: bool = False) -> tuple[Verdict, ...]:
    """Delete the steps that a retention value does not keep.

    Args:
        directory: The run's directory.
        keep: What to keep.
        dry_run: Delete nothing, only return the verdicts.

    Raises:
        RunInUseError: If a process writes to the run.

    Example:
        >>> import tempfile
        >>> import ckpttools as ct
        >>> run = tempfile.mkdtemp()
        >>> with ct.open(ct.CheckpointSpec(directory=run, storage=ct.Storage(asynchronous=False))) as ckpt:
        ...     saved = [ckpt.save(step, {"count": step}) for step in (1, 2, 3)]
        >>> [verdict.step.step for verdict in ct.prune(run, ct.Latest(1)) if not verdict.keep]
        [1]
    """
    run = RunDirectory(require_run_directory(directory))
    with contextlib.nullcontext() if dry_run else run.hold_for_writing():
        verdicts = tuple(run.decide_retention(keep))
        if not dry_run:
            run.prune(keep)
        return verdicts


def empty_quarantine(directory: str | os.PathLike[str], *, dry_run: bool = False) -> tuple[str, ...]:
    """Delete the damaged steps that restores have moved to quarantine.

    Apart from this, only a save that runs out of space with `when_full="prune"` deletes them: `repair` may bring them
    back, and they show what happened. The damaged step that the run's branch depends on stays until a later one is
    committed.

    Args:
        directory: The run's directory.
        dry_run: Delete nothing, only return the names.

    Returns:
        The names of the directories in `.ckpttools/quarantine`.

    Raises:
        RunInUseError: If a process writes to the run.

    Example:
        >>> import tempfile
        >>> import ckpttools as ct
        >>> run = tempfile.mkdtemp()
        >>> with ct.open(ct.CheckpointSpec(directory=run, storage=ct.Storage(asynchronous=False))) as ckpt:
        ...     saved = [ckpt.save(step, {"count": step}) for step in (1, 2)]
        >>> ct.empty_quarantine(run)  # nothing was damaged
        ()
    """
    run = RunDirectory(require_run_directory(directory))
    if dry_run:
        return tuple(path.name for path in run.list_quarantined())
    with run.hold_for_writing():
        return run.empty_quarantine()
