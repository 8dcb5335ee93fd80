# SPDX-License-Identifier: Apache-2.0
"""`record`: add metrics to a committed step, from any process, even while another process trains."""

import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from ..errors import IncompleteStepError, MetricConflictError, StepNotFoundError
from ..store import catalogue, commit, late_metrics
from ..store.manifest import Summary
from ..store.run_directory import require_run_directory
from ..tree.items import as_metric, require_metrics


def record(
    directory: str | os.PathLike[str], step: int, metrics: Mapping[str, Any], *, overwrite: bool = False
) -> dict[str, float]:
    """Record metrics of a committed step, such as those of an evaluation in another process.

    `Best`, `ct.best`, `best_step`, `ls` and `show` use them like metrics that were passed to `save`. No lock is taken.
    When the call returns, the metrics are on disk; an open session reads them before its next deletion.

    Retention uses the metrics recorded so far. A step without the metric is never the best, so choose `Latest(n)` large
    enough for the steps saved during one evaluation, or pin a step until its metric is recorded.

    Args:
        directory: The run's directory.
        step: Number of the step; if several branches have it, the live one.
        metrics: Numbers by name. NaN is recorded and ranks last.
        overwrite: Whether to replace a recorded value, which stays on disk.

    Returns:
        All metrics of the step.

    Raises:
        LeafError: If a metric is not a number, its name is empty or has more than 200 characters, or there are so many
            that they would not be read back.
        StepNotFoundError: If the step is not committed, or was deleted meanwhile; nothing was recorded.
        MetricConflictError: If a different value is recorded and `overwrite` is False; nothing was recorded.
        StorageError: If the directory cannot be written.

    Example:
        >>> import tempfile
        >>> import ckpttools as ct
        >>> run = tempfile.mkdtemp()
        >>> with ct.open(ct.CheckpointSpec(directory=run, storage=ct.Storage(asynchronous=False))) as ckpt:
        ...     saved = [ckpt.save(step, {"count": step}) for step in (1, 2)]
        ...     recorded = ct.record(run, 1, {"val_loss": 0.5})
        ...     ckpt.best_step("val_loss", mode="min")
        1
    """
    root = require_run_directory(directory)
    require_metrics(metrics)
    values = {name: as_metric(name, value) for name, value in metrics.items()}
    entry = _find_entry(root, step)
    summary = entry.manifest.summary if entry.manifest else None
    if summary is None:
        raise entry.error or IncompleteStepError(what=f"step {step} has no manifest.")
    new = {name: value for name, value in values.items() if not _is_equal(summary.metrics.get(name), value)}
    taken = [f"{name}={summary.metrics[name]:g}" for name in new if name in summary.metrics]
    if taken and not overwrite:
        raise MetricConflictError(
            what=f"step {step} already has {', '.join(taken)}; nothing was recorded.",
            why="the last writer would silently decide which step is the best.",
            fix="record it under another name, or pass overwrite=True if the recorded value is wrong.",
        )
    if new:
        with commit.wrap_os_errors(f"the metrics of step {step} cannot be recorded in {root}"):
            name = late_metrics.write_file(root, summary, new)
            if not _still_exists(root, summary):
                late_metrics.remove_file(root, name)
                raise _make_missing_error(root, step, "retention deleted it meanwhile; nothing was recorded.")
    return {**summary.metrics, **new}


def _is_equal(recorded: float | None, value: float) -> bool:
    return recorded is not None and (recorded == value or (math.isnan(recorded) and math.isnan(value)))


def _find_entry(root: pathlib.Path, step: int) -> catalogue.Entry:
    current = catalogue.scan(root)
    found = [entry for entry in (*current.entries, *current.moved_entries) if entry.step == step]
    if type(step) is not int or not found:
        raise _make_missing_error(root, step, "it was never saved, is being saved, or retention has deleted it.")
    return found[0]


def _still_exists(root: pathlib.Path, summary: Summary) -> bool:
    key = late_metrics.get_key(summary)
    entries = catalogue.scan(root).committed_entries
    return any(entry.manifest and late_metrics.get_key(entry.manifest.summary) == key for entry in entries)


def _make_missing_error(root: pathlib.Path, step: Any, why: str) -> StepNotFoundError:
    committed = ", ".join(str(entry.step) for entry in catalogue.scan(root).live_entries)
    return StepNotFoundError(
        what=f"step {step!r} of {root} is not committed.", why=why, fix=f"committed: {committed or 'no steps'}."
    )
