# SPDX-License-Identifier: Apache-2.0
"""Metrics that are recorded after their step was committed, by any process, without the writer's lock.

A manifest is sealed, so each call adds one small file, `.ckpttools/metrics/STEP-...json`: two processes never write to
the same file, and after a kill a file is whole or absent. `catalogue` merges the files into the metrics of the
manifests; the latest file wins. So every reader of a step's metrics sees them.

The name contains the step's number, commit and branch, because a rollback may reuse the number. A damaged file still
identifies its step by its name, and retention keeps that step.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import pathlib
import re
import secrets
import time
from collections.abc import Iterable, Mapping, Set

from ..errors import LeafError
from . import commit, digest, layout
from .manifest import Summary

_NAME = re.compile(r"(0|[1-9]\d{0,17})-(\d{1,18})-([0-9a-f]{8})-(\d{1,20})-[0-9a-f]{8}\.json")
MAX_BYTES = 1 << 20
"""Size of the largest file that is read."""
_ORPHAN_AGE_S = 7 * 86_400.0
"""A file is kept this long after its step was deleted: the mirror may keep the step without having the metric yet."""

type StepKey = tuple[int, int, str]
"""Number of a step, number of its commit, and a hash of its branch."""


@dataclasses.dataclass(frozen=True)
class LateMetrics:
    """The metrics of one file.

    Attributes:
        key: The step.
        time_ns: When they were recorded, in nanoseconds since the epoch; more than that of every file before it.
        metrics: The values by name; None if the file is damaged.
    """

    key: StepKey
    time_ns: int
    metrics: Mapping[str, float] | None


type LateMetricFiles = Mapping[str, LateMetrics]
"""By the name of the file."""


def get_key(summary: Summary) -> StepKey:
    """Return what identifies a step."""
    return summary.step, summary.sequence, hashlib.sha256(summary.lineage[-1][0].encode()).hexdigest()[:8]


def is_file_name(name: str) -> bool:
    """Return whether a name is the name of a metrics file."""
    return _NAME.fullmatch(name) is not None


def list_names(root: pathlib.Path) -> frozenset[str]:
    """Return the names of all metrics files of a run."""
    try:
        with os.scandir(layout.get_control_path(root, "metrics")) as entries:
            return frozenset(entry.name for entry in entries if is_file_name(entry.name))
    except (FileNotFoundError, NotADirectoryError):
        return frozenset()


def read_files(root: pathlib.Path, names: Iterable[str]) -> dict[str, LateMetrics]:
    """Return the contents of files, without those that were removed meanwhile."""
    found = {}
    for name in names:
        with contextlib.suppress(FileNotFoundError):
            found[name] = parse_file(name, _read_bytes(layout.get_control_path(root, f"metrics/{name}")))
    return found


def _read_bytes(path: pathlib.Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(MAX_BYTES)
    except FileNotFoundError:
        raise
    except OSError:
        # One bad sector must not hide the run: the file counts as damaged.
        return b""


def parse_file(name: str, data: bytes) -> LateMetrics:
    """Return the contents of a file; it is damaged unless its digest matches its metrics and the key in its name.

    Args:
        name: The file's name, for which `is_file_name` holds.
        data: Its bytes.
    """
    found = _NAME.fullmatch(name)
    assert found is not None
    step, sequence, branch, time_ns = found.groups()
    key = int(step), int(sequence), branch
    metrics = None
    with contextlib.suppress(ValueError, TypeError, KeyError, AttributeError, RecursionError):
        document = json.loads(data)
        body = document["metrics"]
        if digest.hash_bytes("xxh3", _encode_body(key, body)) == document["digest"]:
            metrics = {str(metric): float(value) for metric, value in body.items()}
    return LateMetrics(key, int(time_ns), metrics)


def _encode_body(key: StepKey, metrics: Mapping[str, float | str]) -> bytes:
    return json.dumps([list(key), metrics], sort_keys=True).encode()


def write_file(root: pathlib.Path, summary: Summary, metrics: Mapping[str, float]) -> str:
    """Add a file with metrics of a step, durably; return its name.

    Raises:
        LeafError: If there are so many that they would not be read back.
    """
    step, sequence, branch = get_key(summary)
    # JSON has no NaN; `float` reads the word back.
    plain = {name: value if math.isfinite(value) else str(value) for name, value in sorted(metrics.items())}
    mark = digest.hash_bytes("xxh3", _encode_body((step, sequence, branch), plain))
    data = json.dumps({"metrics": plain, "digest": mark}).encode()
    if len(data) > MAX_BYTES:
        raise LeafError(
            what=f"{len(metrics)} metrics of step {step} take {len(data):,} bytes; nothing was recorded.",
            why=f"more than {MAX_BYTES:,} bytes are not read back.",
            fix="record fewer of them in a call, under shorter names.",
        )
    # Not the clock alone: that of another machine may be behind, and the later call has to win.
    others = (_NAME.fullmatch(name) for name in list_names(root))
    last = max(
        (int(each[4]) for each in others if each and each[0].startswith(f"{step}-{sequence}-{branch}-")), default=0
    )
    name = f"{step}-{sequence}-{branch}-{max(time.time_ns(), last + 1)}-{secrets.token_hex(4)}.json"
    add_file(root, name, data)
    return name


def add_file(root: pathlib.Path, name: str, data: bytes) -> None:
    """Write the bytes of a metrics file, durably."""
    commit.require_confined(root)
    commit.write_file(layout.get_control_path(root, f"metrics/{name}"), data)


def remove_file(root: pathlib.Path, name: str) -> None:
    """Remove a file whose step was deleted meanwhile."""
    layout.get_control_path(root, f"metrics/{name}").unlink(missing_ok=True)


def sweep(root: pathlib.Path, summaries: Iterable[Summary], unread_steps: Set[int]) -> None:
    """Remove old files of steps that no longer exist, and what killed processes left; only for the lock's holder.

    Args:
        root: The run's directory.
        summaries: The committed steps.
        unread_steps: Numbers of steps that may come back: damaged, in quarantine, or on a disk that is not mounted.
    """
    directory = layout.get_control_path(root, "metrics")
    keys = set(map(get_key, summaries))
    with contextlib.suppress(OSError):
        for path in directory.iterdir():
            found = _NAME.fullmatch(path.name.removesuffix(".new"))
            is_old = time.time() - path.stat().st_mtime > _ORPHAN_AGE_S
            is_kept = found is None or int(found[1]) in unread_steps or (int(found[1]), int(found[2]), found[3]) in keys
            if is_old and (path.suffix == ".new" or not is_kept):
                path.unlink(missing_ok=True)


def merge(summary: Summary, files: LateMetricFiles) -> Summary:
    """Return a summary with the metrics that were recorded later; of two files with the same metric, the later wins."""
    key = get_key(summary)
    mine = sorted((each.time_ns, name) for name, each in files.items() if each.key == key)
    metrics = dict(summary.metrics)
    for _, name in mine:
        metrics.update(files[name].metrics or {})
    return summary if metrics == summary.metrics else dataclasses.replace(summary, metrics=metrics)


def find_damaged(files: LateMetricFiles) -> frozenset[StepKey]:
    """Return the steps that have a damaged metrics file."""
    return frozenset(each.key for each in files.values() if each.metrics is None)
