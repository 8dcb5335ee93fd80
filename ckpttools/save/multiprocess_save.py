# SPDX-License-Identifier: Apache-2.0
"""Saving and restoring by several processes together: each does its part, and what one cannot do none does.

A save has four meetings: the leader has made the staging folder; all have written and digested what they hold; the
leader has made one checkpoint of it, written the manifest and committed; all know how it ended. The parts travel
through the staging folder, since every process sees the run's folder; a process that fails or is missing at a meeting
leaves a staging folder that never becomes a step.

An array of which each process sees all, and a plain value, is written once, by the leader, if it is the same
everywhere; else the other values stand in the manifest, by the number of their process. That is where the states of
data iterators go.
"""

import concurrent.futures
import dataclasses
import json
import os
import pathlib
import shutil
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ..errors import (
    CheckpointError,
    LeafError,
    ProcessError,
    StorageError,
    StructureError,
)
from ..processes.group import Group
from ..spec.spec import CheckpointSpec
from ..store import commit, digest, integrity, layout, manifest, orbax
from ..store.run_directory import RunDirectory
from ..tree.leaves import Path, Record, Slice, encode_value, format_leaf_name
from ..tree.match import is_below
from ..tree.snapshot import Snapshot
from . import write_step
from .outcomes import Saved
from .worker import Worker

_CHANNEL = "save"
_MAX_LOCAL_BYTES = 16 << 20

type LeafFingerprints = dict[str, dict[str, Any]]
"""By item, for each leaf and stateful object of which a process sees all: its form and a digest of its value."""


def save_step(
    run: RunDirectory, spec: CheckpointSpec, job: write_step.Job, worker: Worker, start_time: float, group: Group
) -> Saved:
    """The part of a save that may go on in the background; called by all processes.

    Raises:
        ProcessError: If another process failed or is missing; then nothing was committed.
    """
    root, step = run.directory, job.summary.step
    holder = layout.get_control_path(root, f"staging/{job.staging}")
    staged = holder / str(step)
    save, may_remove = _MultiprocessSave(root, staged, spec, job, group), True
    try:
        save.run_phase("begin", lambda: save.prepare() if group.is_leader else None)
        save.run_phase("write", lambda: save.write(abandoned=worker.is_abandoned.is_set))
        done = group.broadcast(f"the commit of step {step}", lambda: save.commit(run), channel=_CHANNEL)
    except ProcessError as error:
        # Who is not heard of may still be writing there; the next session sweeps it up.
        may_remove = not error.missing
        raise
    finally:
        if group.is_leader and may_remove:
            shutil.rmtree(holder, ignore_errors=True)
    return Saved(
        step=step,
        path=root / done["path"],
        total_bytes=done["total_bytes"],
        seconds=time.monotonic() - start_time,
        stall_s=worker.stall_s,
        reason=job.summary.reason,
        deleted=tuple(done["deleted"]),
        trouble=done["trouble"],
    )


class _MultiprocessSave:
    """One process's part of one save."""

    def __init__(
        self, root: pathlib.Path, staged: pathlib.Path, spec: CheckpointSpec, job: write_step.Job, group: Group
    ) -> None:
        self._root, self._staged, self._spec, self._job, self._group = root, staged, spec, job, group
        self._algorithm = spec.integrity.digest

    def run_phase(self, name: str, work: Callable[[], None]) -> None:
        """Do something, and go on if all could do it."""
        error: CheckpointError | None = None
        try:
            work()
        except CheckpointError as failure:
            error = failure
        except Exception as failure:
            error = write_step.explained(self._root, self._job.summary.step, failure)
            error.__cause__ = failure
        self._group.raise_if_any_failed(f"step {self._job.summary.step}, {name}", error, channel=_CHANNEL)

    def prepare(self) -> None:
        """Make the folders, and tell what the leader's values are; for the leader."""
        for item, records in self._job.snapshot.records.items():
            commit.make_directory(self._staged)
            if any(record.is_in_orbax for record in records):
                (self._staged / item).mkdir()
        self._get_message_path("marks").write_text(json.dumps(_fingerprint_leaves(self._algorithm, self._job.snapshot)))

    def write(self, *, abandoned: Callable[[], bool]) -> None:
        """Write and digest what this process holds."""
        snapshot = self._job.snapshot
        arrays: dict[str, dict[Path, Any]] = {
            item: {**spread, **(snapshot.arrays[item] if self._group.is_leader else {})}
            for item, spread in snapshot.sharded.items()
        }
        with concurrent.futures.ThreadPoolExecutor(1, "ckpttools-digest") as pool:
            hashing = pool.submit(_hash_shards, self._algorithm, snapshot)
            orbax.write_shards(self._staged, snapshot.records, arrays, compression=self._spec.storage.compression)
            slices = hashing.result()
        local: dict[str, manifest.Item] = {}
        if not self._group.is_leader:
            theirs = json.loads(self._get_message_path("marks").read_text())
            local = _collect_local_items(snapshot, _fingerprint_leaves(self._algorithm, snapshot), theirs)
        part = {"slices": slices, "local": manifest.encode_items(local), "files": self._describe_own_files()}
        commit.write_file(self._get_message_path(f"part-{self._group.index}"), json.dumps(part).encode())
        if abandoned():
            raise StorageError(
                what=f"step {self._job.summary.step} was not committed.",
                why="its wait had timed out before.",
                fix="nothing: the next save writes a whole step. Storage(timeout_s=...) waits longer.",
            )

    def commit(self, run: RunDirectory) -> dict[str, Any]:
        """Make one step of all parts, commit it, and delete what nobody keeps; for the leader."""
        try:
            return self._commit(run)
        except CheckpointError:
            raise
        except Exception as error:
            raise write_step.explained(self._root, self._job.summary.step, error) from error

    def _commit(self, run: RunDirectory) -> dict[str, Any]:
        parts = [json.loads(self._get_message_path(f"part-{index}").read_text()) for index in range(self._group.count)]
        records = self._merge_records([part["slices"] for part in parts])
        with_arrays = [item for item, leaves in records.items() if any(record.is_in_orbax for record in leaves)]
        orbax.finalize_shards(self._staged, with_arrays)
        local = {index: manifest.decode_items(part["local"]) for index, part in enumerate(parts) if part["local"]}
        write_step.finalize_step(
            self._staged,
            self._spec,
            self._job,
            records,
            {name: (size, mark) for part in parts for name, (size, mark) in part["files"].items()},
            processes=self._group.count,
            local=local,
        )
        path = commit.commit_step(self._root, self._staged, self._job.summary.step)
        total_bytes, deleted, trouble = write_step.run_post_commit(run, self._spec, self._job, path)
        return {"path": path.name, "total_bytes": total_bytes, "deleted": list(deleted), "trouble": trouble}

    def _merge_records(self, parts: list[dict[str, list[Any]]]) -> dict[str, tuple[Record, ...]]:
        """The leader's records with the digests of all parts."""
        snapshot, merged = self._job.snapshot, {}
        for item, records in write_step.add_digests(self._algorithm, snapshot).items():
            found: dict[str, dict[Slice, str]] = {}
            for part in parts:
                for path, where, mark in part[item]:
                    found.setdefault(_encode_path(path), {})[tuple((a, b) for a, b in where)] = mark
            merged[item] = tuple(
                self._merge_shards(item, record, found.get(_encode_path(record.path), {}))
                if record.path in snapshot.sharded[item]
                else record
                for record in records
            )
        return merged

    def _merge_shards(self, item: str, record: Record, slices: Mapping[Slice, str]) -> Record:
        marks = tuple(sorted(slices.items()))
        if not integrity.has_full_coverage(marks, self._job.snapshot.sharded[item][record.path].shape):
            raise ProcessError(
                what=f"the {len(marks)} parts of {format_leaf_name(item, record.path)} are not the whole of it.",
                why="a device of it belongs to no process of this run; the step was not committed.",
                fix="shard the state over devices of the run's own processes.",
            )
        return dataclasses.replace(record, slices=marks)

    def _describe_own_files(self) -> dict[str, tuple[int, str]]:
        """Size and digest of the files that this process has written and that stay as they are."""
        folder = f"ocdbt.process_{self._group.index}"
        found = {}
        for item in self._job.snapshot.records:
            for parent, _, names in os.walk(self._staged / item / folder):
                for name in names:
                    path = pathlib.Path(parent, name)
                    mark = digest.hash_file(self._algorithm, path)
                    found[path.relative_to(self._staged).as_posix()] = (path.stat().st_size, mark)
        return found

    def _get_message_path(self, name: str) -> pathlib.Path:
        """A file that the processes tell each other something in; it lies beside the step, not in it."""
        return self._staged.parent / f"{name}.json"


def _hash_shards(algorithm: str, snapshot: Snapshot) -> dict[str, list[Any]]:
    """For each item: path, place and digest of every part of an array that this process is the first to hold."""
    found: dict[str, list[Any]] = {item: [] for item in snapshot.sharded}
    for item, arrays in snapshot.sharded.items():
        for path, array in arrays.items():
            for shard in array.addressable_shards:
                if shard.replica_id == 0:
                    where = [part.indices(size)[:2] for part, size in zip(shard.index, array.shape)]
                    found[item].append([list(path), where, digest.hash_array(algorithm, np.asarray(shard.data))])
    return found


def _fingerprint_leaves(algorithm: str, snapshot: Snapshot) -> LeafFingerprints:
    marks: LeafFingerprints = {}
    for item, records in write_step.add_digests(algorithm, snapshot).items():
        roots, spread = snapshot.skeletons[item], snapshot.sharded[item]
        marks[item] = {}
        for record in records:
            if not is_below(record.path, roots):
                text = json.dumps(record.to_json()).encode()
                value = None if record.path in spread else digest.hash_bytes(algorithm, text)
                form = [record.kind, list(record.shape), record.dtype, record.path in spread]
                marks[item][_encode_path(record.path)] = [form, value]
        for root, skeleton in roots.items():
            inside = [record.to_json() for record in records if is_below(record.path, [root])]
            marks[item][_encode_path(root)] = [
                "object",
                digest.hash_bytes(algorithm, json.dumps([skeleton, inside]).encode()),
            ]
    return marks


def _collect_local_items(
    snapshot: Snapshot, own_fingerprints: LeafFingerprints, leader_fingerprints: LeafFingerprints
) -> dict[str, manifest.Item]:
    """What this process has to keep of its own.

    Raises:
        StructureError: If its state has other leaves than the leader's.
        LeafError: If it is too much for a manifest.
    """
    _require_same_leaves(own_fingerprints, leader_fingerprints)
    found: dict[str, manifest.Item] = {}
    total = 0
    for item, marks in own_fingerprints.items():
        changed = {path for path, mark in marks.items() if mark != leader_fingerprints[item][path]}
        skeletons = {
            root: skeleton for root, skeleton in snapshot.skeletons[item].items() if _encode_path(root) in changed
        }
        records = []
        for record in snapshot.records[item]:
            if _encode_path(record.path) in changed or is_below(record.path, skeletons):
                array = snapshot.arrays[item].get(record.path)
                total += 0 if array is None else array.nbytes
                value = (
                    record.value
                    if array is None
                    else encode_value(format_leaf_name(item, record.path), array.tobytes())
                )
                records.append(dataclasses.replace(record, value=value))
        if records or skeletons:
            found[item] = manifest.Item(records=tuple(records), skeletons=skeletons)
    if total > _MAX_LOCAL_BYTES:
        raise LeafError(
            what=f"this process has {total:,} bytes of its own that differ from the leader's: {', '.join(found)}.",
            why=f"they would stand in the manifest, which holds at most {_MAX_LOCAL_BYTES:,} bytes for each.",
            fix="make a global array of them (jax.make_array_from_process_local_data), or leave them out.",
        )
    return found


def _require_same_leaves(own_fingerprints: LeafFingerprints, leader_fingerprints: LeafFingerprints) -> None:
    def list_forms(fingerprints: LeafFingerprints) -> set[str]:
        return {f"{item} {path} {mark[0]}" for item, leaves in fingerprints.items() for path, mark in leaves.items()}

    other = sorted(list_forms(own_fingerprints) ^ list_forms(leader_fingerprints))
    if other:
        raise StructureError(
            what=f"this process and the leader pass in states that differ in {len(other)} leaves, such as {other[0]}.",
            why="one step is one state, of which each process holds a part.",
            fix="build the same state in every process.",
        )


def _encode_path(path: Path | list[str | int]) -> str:
    return json.dumps(list(path))
