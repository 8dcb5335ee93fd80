# SPDX-License-Identifier: Apache-2.0
"""One save, from a snapshot to a committed step: write the arrays, read them back, write the manifest, commit, prune.

Leaf digests are computed from the snapshot's arrays while Orbax writes them; file digests from what was written,
through the page cache. Whatever fails before the rename in `store.commit` leaves the run as it was.
"""

import concurrent.futures
import dataclasses
import errno
import os
import pathlib
import shutil
import time
from collections.abc import Callable, Mapping
from typing import Any

from ..errors import CheckpointError, CorruptStepError, DiskSpaceError, StorageError
from ..spec.spec import CheckpointSpec
from ..spec.state import as_rules, as_state_version
from ..store import commit, digest, layout, leaf_integrity, manifest, orbax
from ..store.run_directory import RunDirectory
from ..tree.records import Record
from ..tree.snapshot import Snapshot, SnapshotItem, SnapshotLeaf
from .outcomes import Saved
from .worker import Worker

_OVERHEAD_BYTES = 1 << 20
"""Lower bound for Orbax's metadata and the manifest."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """A save that has been decided on.

    Attributes:
        snapshot: The state.
        summary: The summary without its files.
        triggers: Memory of the triggers after this save.
        outputs: Outputs of the validation function.
        surgery: Operations that were applied in this run before, as code.
        staging: Name of the staging directory; its random part is the same in all processes.
    """

    snapshot: Snapshot
    summary: manifest.Summary
    triggers: Any
    outputs: Any
    surgery: tuple[str, ...] = ()
    staging: str = ""


def save_step(run: RunDirectory, spec: CheckpointSpec, job: Job, worker: Worker, start_time: float) -> Saved:
    """Write, commit and only then delete: the part of a save that may run in the background.

    Args:
        run: The run directory.
        spec: The run's spec.
        job: What to save.
        worker: The thread that this runs in.
        start_time: `time.monotonic()` when the save was requested.
    """
    try:
        path = write_step(run.directory, spec, job, may_commit=worker.may_commit)
    except StorageError:
        run.invalidate()  # The step may still have been committed.
        raise
    total_bytes, deleted, trouble = run_post_commit(run, spec, job, path)
    return Saved(
        step=job.summary.step,
        path=path,
        total_bytes=total_bytes,
        seconds=time.monotonic() - start_time,
        stall_s=worker.stall_s,
        reason=job.summary.reason,
        deleted=deleted,
        trouble=trouble,
    )


def run_post_commit(
    run: RunDirectory, spec: CheckpointSpec, job: Job, path: pathlib.Path
) -> tuple[int, tuple[int, ...], str]:
    """Write the second copies and apply retention, once the step is committed.

    Returns:
        The step's bytes, the deleted steps, and what went wrong: since the step is committed, a failure to delete an
        old one is not a failure of the save.
    """
    total_bytes = 0
    try:
        run.add(path)
        commit.copy_small_files(path, layout.get_spare_directory(run.directory, job.summary.sequence))
        total_bytes = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        return total_bytes, run.prune(spec.keep), ""
    except OSError as error:
        run.invalidate()
        text = f"step {job.summary.step} is saved; old steps could not be deleted: "
        return total_bytes, (), text + (error.what if isinstance(error, StorageError) else str(error))


def make_room(run: RunDirectory, spec: CheckpointSpec, job: Job) -> None:
    """Check that there is enough disk space for a save; delete what retention allows if the spec says so.

    Raises:
        DiskSpaceError: If there is not.
    """
    save_bytes = _OVERHEAD_BYTES + job.snapshot.array_bytes
    if spec.storage.when_full == "prune":
        try:
            return require_space(run.directory, spec, save_bytes)
        except DiskSpaceError:
            # Damaged steps are deleted first, and intact ones only if that was not enough.
            run.empty_quarantine()
        try:
            return require_space(run.directory, spec, save_bytes)
        except DiskSpaceError:
            run.prune(spec.keep, next_lineage=job.summary.lineage)
    return require_space(run.directory, spec, save_bytes)


def require_space(root: pathlib.Path, spec: CheckpointSpec, save_bytes: int) -> None:
    """Raise `DiskSpaceError` unless `save_bytes` fit and leave the spec's free space; nothing is written."""
    try:
        free = shutil.disk_usage(root).free
    except OSError as error:
        raise StorageError(
            what=f"{root} is gone: {error}.",
            why="the run's directory was there when the run was opened.",
            fix="check the disk, and what else deletes there; the next save tries again.",
        ) from error
    needed = spec.storage.compute_required_bytes(save_bytes)
    if free < needed:
        raise DiskSpaceError(
            what=f"{root} has {free:,} bytes free; this save takes {save_bytes:,} and the spec asks for {needed:,}.",
            why="a save that runs out of space takes its time and leaves nothing.",
            fix="free some space, lower min_free, keep fewer steps"
            + ("." if spec.storage.when_full == "prune" else ', or set Storage(when_full="prune").'),
        )


def write_step(root: pathlib.Path, spec: CheckpointSpec, job: Job, *, may_commit: Callable[[], bool]) -> pathlib.Path:
    """Write, verify and commit one step.

    Args:
        root: The run's directory.
        spec: The run's spec.
        job: What to save.
        may_commit: Called right before the commit; returns False if the caller stopped waiting, so that the arrays may
            have changed during the save.

    Returns:
        The directory of the committed step.

    Raises:
        StorageError: If the disk cannot be written; the run is as it was.
        CorruptStepError: If the readback finds other bytes than those of the snapshot; the run is as it was.
    """
    step = job.summary.step
    holder = layout.get_control_path(root, f"staging/{job.staging}")
    try:
        staged = holder / str(step)
        commit.make_directory(holder)
        _write_files(staged, spec, job)
        if not may_commit():
            raise make_interrupted_error(step)
        return commit.commit_step(root, staged, step)
    except CheckpointError:
        raise
    except Exception as error:
        raise make_save_error(root, step, error) from error
    finally:
        shutil.rmtree(holder, ignore_errors=True)


def _write_files(staged: pathlib.Path, spec: CheckpointSpec, job: Job) -> None:
    with concurrent.futures.ThreadPoolExecutor(1, "ckpttools-digest") as pool:
        hashing = pool.submit(add_digests, spec.integrity.digest, job.snapshot)
        orbax.write(staged, job.snapshot, compression=spec.storage.compression)
        digested = hashing.result()
    finalize_step(staged, spec, job, digested)


def finalize_step(
    staged: pathlib.Path,
    spec: CheckpointSpec,
    job: Job,
    snapshot: Snapshot,
    files: Mapping[str, tuple[int, str]] | None = None,
    **parts: Any,
) -> None:
    """Read back what was written, if the spec says so, and write the manifest.

    Args:
        staged: The step's staging directory.
        spec: The run's spec.
        job: What was saved.
        snapshot: The job's snapshot with its digests.
        files: Sizes and digests of files that were computed before.
        parts: What a save by several processes adds to the manifest's contents.
    """
    algorithm = spec.integrity.digest
    if spec.integrity.verify == "readback":
        _read_back(staged, job.summary.step, snapshot.records)
    items = {
        name: manifest.Item(records=item.records, skeletons=item.skeletons) for name, item in snapshot.items.items()
    }
    summary = dataclasses.replace(job.summary, files=describe_files(staged, algorithm, files or {}))
    contents = manifest.Contents(
        items=items,
        triggers=job.triggers,
        outputs=job.outputs,
        state_version=as_state_version(spec.state_version).number,
        surgery=job.surgery,
        exclude=as_rules(spec.exclude),
        excluded=job.snapshot.excluded,
        **parts,
    )
    manifest.write(staged, summary, contents, algorithm=algorithm)


def add_digests(algorithm: str, snapshot: Snapshot) -> Snapshot:
    """Return the snapshot with a digest in the record of each array that this process holds all of."""

    def add_digest(leaf: SnapshotLeaf) -> SnapshotLeaf:
        if leaf.host_array is None:
            return leaf
        text = digest.hash_array(algorithm, leaf.host_array)
        return dataclasses.replace(leaf, record=dataclasses.replace(leaf.record, digest=text))

    return Snapshot(
        {
            name: SnapshotItem(tuple(map(add_digest, item.leaves)), item.skeletons)
            for name, item in snapshot.items.items()
        }
    )


def describe_files(
    directory: pathlib.Path, algorithm: str, known_files: Mapping[str, tuple[int, str]] | None = None
) -> dict[str, tuple[int, str]]:
    """Return size and digest of each file of a step except its manifest and what a kill left of one.

    Args:
        directory: The step.
        algorithm: Of the digests.
        known_files: Sizes and digests that need not be computed again if the size still matches.
    """
    known_files = known_files or {}
    files = {}
    for parent, _, names in os.walk(directory, onerror=commit.raise_for_os_error):
        for name in names:
            path = pathlib.Path(parent, name)
            relative = path.relative_to(directory).as_posix()
            if relative not in (layout.MANIFEST, f"{layout.MANIFEST}{commit.TEMPORARY}"):
                size = path.stat().st_size
                is_known = relative in known_files and known_files[relative][0] == size
                files[relative] = known_files[relative] if is_known else (size, digest.hash_file(algorithm, path))
    return dict(sorted(files.items()))


def _read_back(staged: pathlib.Path, step: int, records: Mapping[str, tuple[Record, ...]]) -> None:
    try:
        arrays = orbax.read(staged, records)
    except orbax.ReadError as error:
        raise CorruptStepError(
            what=f"step {step} could not be read back from the disk: {error}.",
            why="what was written is damaged; the step was not committed.",
            fix="save to another disk.",
        ) from error
    damaged = tuple(leaf_integrity.find_damaged_leaves(records, arrays))
    if damaged:
        failure = CorruptStepError(
            what=f"step {step} came back from the disk with other bytes in {', '.join(damaged)}.",
            why="the disk or the memory is failing; the step was not committed.",
            fix="save to another disk.",
        )
        failure.step, failure.leaves = step, damaged
        raise failure


def make_interrupted_error(step: int) -> StorageError:
    """Return the error for a save whose caller has stopped waiting for it."""
    return StorageError(
        what=f"step {step} was not committed.",
        why="the wait for it was interrupted or timed out, and its arrays may have changed since.",
        fix="nothing: the next save writes a whole step. Storage(timeout_s=...) waits longer.",
    )


def make_save_error(root: pathlib.Path, step: int, error: Exception) -> StorageError:
    """Return a `StorageError` for an error of the disk, of Orbax or of TensorStore, which wrap those of the disk."""
    is_full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
    kind = DiskSpaceError if is_full else StorageError
    if isinstance(error, RuntimeError) and "shutdown" in str(error):
        return StorageError(
            what=f"step {step} was not saved to {root}: the program ended before the save did.",
            why="a save needs threads, and Python starts none at exit; all earlier steps are as they were.",
            fix="wait() or close() at the end of the program, or the session in a with block.",
        )
    return kind(
        what=f"step {step} could not be saved to {root}: {type(error).__name__}: {error}",
        why="the save failed before its commit; all earlier steps are as they were.",
        fix="free some space and save again." if is_full else "see the cause above; the next save tries again.",
    )
