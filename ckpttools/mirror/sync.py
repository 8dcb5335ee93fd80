# SPDX-License-Identifier: Apache-2.0
"""Bring a mirror up to date by hand, and verify what it holds: `ct.sync_mirror` and its report."""

import dataclasses
import os
import pathlib
from collections.abc import Mapping
from typing import Any, Literal

from ..errors import StepDamagedError
from ..spec.mirror import Mirror, as_mirror
from ..spec.retention import All
from ..store import catalogue
from ..store.manifest import Summary
from ..store.run_directory import RunDirectory
from .fetch import Progress
from .remote_store import Copy, RemoteStore
from .upload_plan import CopyNames, get_summaries, make_upload_plan, require_outside_run

type CopyState = Literal["complete", "damaged", "missing", "another run's"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MirroredStep:
    """One step, in the run directory and at the mirror.

    Example:
        >>> import ckpttools as ct
        >>> ct.MirroredStep(step=1, total_bytes=8, here=True, there="complete").ok
        True

    Attributes:
        step: Its number.
        total_bytes: Size of its files, in bytes.
        here: Whether it is in the run directory.
        there: Its state at the mirror before the sync.
        files: Its damaged files at the mirror.
        done: What was done, or would be done in a dry run: "copied", "deleted", "repaired", or why nothing could be
            done; "" if there was nothing to do.
        ok: Whether the step is fine after the sync.
    """

    step: int
    total_bytes: int
    here: bool
    there: CopyState
    files: tuple[str, ...] = ()
    done: str = ""
    ok: bool = True


@dataclasses.dataclass(frozen=True)
class MirrorReport:
    """What `sync_mirror` found and did.

    Example:
        >>> import ckpttools as ct
        >>> print(ct.MirrorReport("s3://bucket/run", steps=(), dry_run=False))
        s3://bucket/run
        no steps in either place

    Attributes:
        url: The mirror's address.
        steps: Every step of either place.
        dry_run: Whether this was a dry run, which changes nothing.
        unverified: Steps that plain Orbax wrote; they have no digests and are not copied before `ct.adopt`.
    """

    url: str
    steps: tuple[MirroredStep, ...]
    dry_run: bool
    unverified: tuple[int, ...] = ()

    @property
    def ok(self) -> bool:
        """Return whether every step is fine after the sync."""
        return all(step.ok for step in self.steps)

    def as_dict(self) -> dict[str, Any]:
        """Return the report as plain data."""
        return {"ok": self.ok, **dataclasses.asdict(self)}

    def __str__(self) -> str:
        lines = [f"{self.url}{' (dry run, nothing was changed)' if self.dry_run else ''}"]
        for step in self.steps:
            here = "here" if step.here else "not here"
            lines.append(f"step {step.step}: {here}, {step.there} there{'; ' + step.done if step.done else ''}")
            lines += [f"    damaged file: {file}" for file in step.files]
        lines += [self.left] if self.left else []
        return "\n".join(lines if self.steps or self.left else [*lines, "no steps in either place"])

    @property
    def left(self) -> str:
        """Return a line about the steps that are not copied; empty if there are none."""
        steps = ", ".join(map(str, self.unverified))
        return steps and f"not copied, because plain Orbax wrote them without digests: {steps}; adopt them first"


def sync_mirror(
    directory: str | os.PathLike[str],
    mirror: Mirror | str,
    *,
    check: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> MirrorReport:
    """Copy what a mirror lacks, and delete what its retention does not keep; without a retention, delete nothing.

    Args:
        directory: The run directory.
        mirror: The mirror or its address.
        check: Also read every byte at the mirror, and copy damaged steps again.
        dry_run: Report what would be done, and change nothing.
        progress: Called with the bytes copied or read so far and their total.

    Returns:
        Every step of either place, and what was done.

    Raises:
        MirrorError: If the store does not answer.
        RunInUseError: If a process writes to the run; that process copies its steps itself.

    Example:
        >>> import pathlib, tempfile, jax.numpy as jnp, ckpttools as ct
        >>> root = pathlib.Path(tempfile.mkdtemp())
        >>> with ct.open(ct.CheckpointSpec(directory=root / "run")) as ckpt:
        ...     _ = ckpt.save(1, {"model": {"w": jnp.ones(2)}})
        >>> ct.sync_mirror(root / "run", f"file://{root}/copies").steps[0].done
        'copied'
    """
    root, place = pathlib.Path(directory).absolute(), as_mirror(mirror)
    assert place is not None
    require_outside_run(root, place)
    run = RunDirectory(root)
    if not dry_run:
        run.lock_for_writing()
    try:
        show = progress or (lambda done, total: None)
        return _Sync(root, run.refresh_steps(), place, show, dry_run).run(check, dry_run)
    finally:
        run.lock.release()


class _Sync:
    """One comparison of a run with its mirror, and the copies and deletions that follow."""

    def __init__(
        self, root: pathlib.Path, steps: catalogue.Catalogue, mirror: Mirror, progress: Progress, dry_run: bool
    ) -> None:
        self._mirror, self._progress = mirror, progress
        self._store = RemoteStore(mirror.url, mirror.store_options)
        self._local_entries = CopyNames().name_entries(steps)
        if not dry_run:
            self._store.upload_metrics(root, get_summaries(self._local_entries).values())
        names = self._store.list_names()
        self._unverified_steps = tuple(entry.step for entry in steps.entries if entry.state == "unverified")
        self._copies: Mapping[str, Copy] = {name: copy for name in names if (copy := self._store.read_copy(name))}
        self._summaries: dict[str, Summary] = {
            **get_summaries(self._local_entries),
            **{name: copy.manifest.summary for name, copy in self._copies.items()},
        }
        self._plan = make_upload_plan(
            get_summaries(self._local_entries),
            {name: copy.manifest.summary for name, copy in self._copies.items()},
            names,
            mirror.keep or All(),
            lineage=steps.lineage,
            deleted={},
            pins=catalogue.read_pins(root),
        )
        if not dry_run:
            self._store.upload_metrics(root, (copy.manifest.summary for copy in self._copies.values()))
        self._done_bytes = self._total_bytes = 0

    def run(self, check: bool, dry_run: bool) -> MirrorReport:
        checked = [name for name in self._copies if check and name not in self._plan.foreign_names]
        self._total_bytes = sum(self._summaries[name].total_bytes for name in (*checked, *self._plan.names_to_copy))
        rows = {name: self._sync_step(name, name in checked, dry_run) for name in self._summaries}
        if not dry_run:
            for name in self._plan.names_to_delete:
                self._store.delete(name)
        ordered = sorted(rows, key=lambda name: (self._summaries[name].saved_at, name))
        return MirrorReport(self._mirror.url, tuple(rows[name] for name in ordered), dry_run, self._unverified_steps)

    def _sync_step(self, name: str, check: bool, dry_run: bool) -> MirroredStep:
        summary = self._summaries[name]
        there: CopyState = "complete" if name in self._copies else "missing"
        files: tuple[str, ...] = ()
        done, ok = "", True
        if name in self._plan.foreign_names:
            there = "another run's"
        elif name in self._plan.names_to_delete:
            done = "would be deleted" if dry_run else "deleted"
        elif name in self._plan.names_to_copy:
            done, ok = ("would be copied", True) if dry_run else self._upload(name, "copied")
        elif check and (files := self._store.find_damaged_files(self._copies[name])):
            there, done, ok = "damaged", "no local copy to repair it from", False
            if name in self._local_entries:
                done, ok = ("would be repaired", False) if dry_run else self._upload(name, "repaired")
        if check or name in self._plan.names_to_copy:
            self._done_bytes += summary.total_bytes
            self._progress(self._done_bytes, self._total_bytes)
        return MirroredStep(
            step=summary.step,
            total_bytes=summary.total_bytes,
            here=name in self._local_entries,
            there=there,
            files=files,
            done=done,
            ok=ok,
        )

    def _upload(self, name: str, action: str) -> tuple[str, bool]:
        try:
            self._store.upload(self._local_entries[name].path, readback=self._mirror.verify == "readback")
        except StepDamagedError as error:
            return f"not {action}: {error.what}", False
        return action, True
