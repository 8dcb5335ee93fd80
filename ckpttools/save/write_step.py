# SPDX-License-Identifier: Apache-2.0
"""One save, from a snapshot to a committed step.

Sits on `state` (what is saved) and `store` (where to). Leaf digests are taken from the arrays as they were handed
over, while Orbax writes them; file digests from what was written, through the page cache. Whatever fails before the
rename leaves the run as it was.
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
from ..spec.state_version import as_state_version
from ..store import commit, digest, integrity, layout, manifest, orbax
from ..store.run_directory import RunDirectory
from ..tree.leaves import Record, count_host_bytes
from ..tree.snapshot import Snapshot
from .outcomes import Saved
from .worker import Worker

_OVERHEAD_BYTES = 1 << 20
"""What Orbax's metadata and the manifest take at the least."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """A save that has been decided upon.

    Attributes:
        snapshot: The state.
        summary: The summary without its files.
        triggers: Memory of the triggers after this save.
        outputs: Outputs of the validation function.
        surgery: Operations that were applied in this run before, as code.
        staging: Name of the staging folder; its random part is alike in all processes.
    """

    snapshot: Snapshot
    summary: manifest.Summary
    triggers: Any
    outputs: Any
    surgery: tuple[str, ...] = ()
    staging: str = ""


def estimate_bytes(snapshot: Snapshot) -> int:
    """Bytes that a save will take on the disk, uncompressed."""
    return _OVERHEAD_BYTES + sum(count_host_bytes(records) for records in snapshot.records.values())


def save_step(run: RunDirectory, spec: CheckpointSpec, job: Job, worker: Worker, start_time: float) -> Saved:
    """The part of a save that may go on in the background: write, commit, and only then delete.

    Args:
        run: The run.
        spec: Its spec.
        job: What to save.
        worker: The thread that this runs in.
        start_time: `time.monotonic()` when the save was asked for.
    """
    try:
        path = write_step(run.directory, spec, job, is_abandoned=worker.is_abandoned.is_set)
    except StorageError:
        run.invalidate()  # The step may stand there all the same, unconfirmed.
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
    """What follows a commit: second copies, and retention.

    Returns:
        The step's bytes, the steps that were deleted, and what went wrong: with the step committed, trouble with an
        old one is no failure of the save.
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
    """Make sure that there is room for a save, by deleting what retention allows if the spec says so."""
    save_bytes = estimate_bytes(job.snapshot)
    if spec.storage.when_full == "prune":
        try:
            return require_space(run.directory, spec, save_bytes)
        except DiskSpaceError:
            # What is damaged goes first, and what is intact only if that was not enough.
            run.empty_quarantine()
        try:
            return require_space(run.directory, spec, save_bytes)
        except DiskSpaceError:
            run.prune(spec.keep)
    return require_space(run.directory, spec, save_bytes)


def require_space(root: pathlib.Path, spec: CheckpointSpec, save_bytes: int) -> None:
    """Raise `DiskSpaceError` unless the spec's free space is there; nothing is written."""
    try:
        free = shutil.disk_usage(root).free
    except OSError as error:
        raise StorageError(
            what=f"{root} is gone: {error}.",
            why="the folder of the run was there when it was opened.",
            fix="look at the disk and at who deletes there; the next save tries anew.",
        ) from error
    needed = spec.storage.compute_required_bytes(save_bytes)
    if free < needed:
        raise DiskSpaceError(
            what=f"{root} has {free:,} bytes free; this save takes {save_bytes:,} and the spec asks for {needed:,}.",
            why="a save that runs out of room costs its time and leaves nothing.",
            fix="free some space, lower min_free, keep fewer steps"
            + ("." if spec.storage.when_full == "prune" else ', or set Storage(when_full="prune").'),
        )


def write_step(root: pathlib.Path, spec: CheckpointSpec, job: Job, *, is_abandoned: Callable[[], bool]) -> pathlib.Path:
    """Write, prove and commit one step.

    Args:
        root: The run's folder.
        spec: The run's spec.
        job: What to save.
        is_abandoned: Asked right before the commit: whether the caller has given up waiting and gone on, so that the
            arrays may have changed under the save.

    Returns:
        The folder of the committed step.

    Raises:
        StorageError: If the disk refused; the run is as it was.
        CorruptStepError: If the readback found other bytes than were handed over; the run is as it was.
    """
    step = job.summary.step
    holder = layout.get_control_path(root, f"staging/{job.staging}")
    try:
        staged = holder / str(step)
        commit.make_directory(holder)
        _write_tree(staged, spec, job)
        if is_abandoned():
            raise StorageError(
                what=f"step {step} was not committed.",
                why="its wait had timed out before.",
                fix="nothing: the next save writes a whole step. Storage(timeout_s=...) waits longer.",
            )
        return commit.commit_step(root, staged, step)
    except CheckpointError:
        raise
    except Exception as error:
        raise explained(root, step, error) from error
    finally:
        shutil.rmtree(holder, ignore_errors=True)


def _write_tree(staged: pathlib.Path, spec: CheckpointSpec, job: Job) -> None:
    algorithm = spec.integrity.digest
    with concurrent.futures.ThreadPoolExecutor(1, "ckpttools-digest") as pool:
        hashing = pool.submit(add_digests, algorithm, job.snapshot)
        orbax.write(staged, job.snapshot.records, job.snapshot.arrays, compression=spec.storage.compression)
        records = hashing.result()
    finalize_step(staged, spec, job, records)


def finalize_step(
    staged: pathlib.Path,
    spec: CheckpointSpec,
    job: Job,
    records: dict[str, tuple[Record, ...]],
    files: Mapping[str, tuple[int, str]] | None = None,
    **parts: Any,
) -> None:
    """Read back what was written, if the spec says so, and write the manifest.

    Args:
        staged: The folder of the step.
        spec: The run's spec.
        job: What was saved.
        records: The leaves with their digests.
        files: Sizes and digests of files that are known already.
        parts: What several processes add to the contents.
    """
    algorithm = spec.integrity.digest
    if spec.integrity.verify == "readback":
        _read_back(staged, job.summary.step, records)
    items = {item: manifest.Item(records=records[item], skeletons=job.snapshot.skeletons[item]) for item in records}
    summary = dataclasses.replace(job.summary, files=describe_files(staged, algorithm, files or {}))
    contents = manifest.Contents(
        items=items,
        triggers=job.triggers,
        outputs=job.outputs,
        state_version=as_state_version(spec.state_version).number,
        surgery=job.surgery,
        **parts,
    )
    manifest.write(staged, summary, contents, algorithm=algorithm)


def add_digests(algorithm: str, snapshot: Snapshot) -> dict[str, tuple[Record, ...]]:
    """The records with the digests of the arrays that this process holds all of."""
    return {
        item: tuple(
            dataclasses.replace(record, digest=digest.hash_array(algorithm, snapshot.arrays[item][record.path]))
            if record.path in snapshot.arrays[item]
            else record
            for record in records
        )
        for item, records in snapshot.records.items()
    }


def describe_files(
    directory: pathlib.Path, algorithm: str, known_files: Mapping[str, tuple[int, str]] | None = None
) -> dict[str, tuple[int, str]]:
    """Size and digest of each file of a step except its manifest; what is known of a file of that size is taken."""
    known_files = known_files or {}
    files = {}
    for parent, _, names in os.walk(directory, onerror=commit.raise_for_os_error):
        for name in names:
            path = pathlib.Path(parent, name)
            relative = path.relative_to(directory).as_posix()
            if relative != layout.MANIFEST:
                size = path.stat().st_size
                is_known = relative in known_files and known_files[relative][0] == size
                files[relative] = known_files[relative] if is_known else (size, digest.hash_file(algorithm, path))
    return dict(sorted(files.items()))


def _read_back(staged: pathlib.Path, step: int, records: dict[str, tuple[Record, ...]]) -> None:
    try:
        arrays = orbax.read(staged, records)
    except orbax.ReadError as error:
        raise CorruptStepError(
            what=f"step {step} could not be read back from the disk: {error}.",
            why="what was written is damaged; the step was not committed.",
            fix="save to another disk.",
        ) from error
    damaged = tuple(integrity.find_damaged_leaves(records, arrays))
    if damaged:
        failure = CorruptStepError(
            what=f"step {step} came back from the disk with other bytes in {', '.join(damaged)}.",
            why="the disk or the memory is failing; the step was not committed.",
            fix="save to another disk.",
        )
        failure.step, failure.leaves = step, damaged
        raise failure


def explained(root: pathlib.Path, step: int, error: Exception) -> StorageError:
    """An error of the disk, or of Orbax and TensorStore, which wrap those of the disk in types of their own."""
    full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
    kind = DiskSpaceError if full else StorageError
    if isinstance(error, RuntimeError) and "shutdown" in str(error):
        return StorageError(
            what=f"step {step} was not saved to {root}: the program ended before the save did.",
            why="a save needs threads, of which Python makes none any more; all earlier steps are as they were.",
            fix="wait() or close() at the end of the program, or the session in a with block.",
        )
    return kind(
        what=f"step {step} could not be saved to {root}: {type(error).__name__}: {error}",
        why="the save was given up before its commit; all earlier steps are as they were.",
        fix="free some space and save again." if full else "look at the cause above; the next save tries anew.",
    )
