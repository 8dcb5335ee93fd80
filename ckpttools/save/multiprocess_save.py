# SPDX-License-Identifier: Apache-2.0
"""A save by several processes: each writes its shards, the leader commits, and if one fails nothing is committed.

A save has four barriers: the leader has made the staging directory; all have written and hashed what they hold; the
leader has merged it into one checkpoint, written the manifest and committed; all know the outcome. Data is exchanged
through files in the staging directory, since every process sees the run's directory. A process that fails or is
missing at a barrier leaves a staging directory that never becomes a step.

A plain value, or an array that each process holds all of, is written once, by the leader, if it is the same
everywhere; the values that differ are stored in the manifest under the index of their process. That is how the states
of data iterators are saved.
"""

import concurrent.futures
import dataclasses
import functools
import json
import os
import pathlib
import shutil
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ..errors import CheckpointError, LeafError, ProcessError, StructureError
from ..processes.messages import Group
from ..spec.spec import CheckpointSpec
from ..store import commit, digest, layout, leaf_integrity, manifest, orbax
from ..store.run_directory import RunDirectory
from ..tree.leaf_paths import Path, format_leaf_name, is_below
from ..tree.records import Slice, encode_value
from ..tree.snapshot import Snapshot, SnapshotItem, SnapshotLeaf
from . import write_step
from .outcomes import Saved
from .worker import Worker

_CHANNEL = "save"
_MAX_LOCAL_BYTES = 16 << 20

type LeafFingerprints = dict[str, dict[str, Any]]
"""By item, for each leaf and stateful object: kind, shape and dtype, and a digest of the value if it is not sharded."""


def save_step(
    run: RunDirectory, spec: CheckpointSpec, job: write_step.Job, worker: Worker, start_time: float, group: Group
) -> Saved:
    """Save one step together with the other processes; called by all of them, also in the background.

    Raises:
        ProcessError: If another process failed or is missing; then nothing was committed.
    """
    root, step = run.directory, job.summary.step
    holder = layout.get_control_path(root, f"staging/{job.staging}")
    staged = holder / str(step)
    save, may_remove = _MultiprocessSave(root, staged, spec, job, group), True
    try:
        save.run_phase("begin", lambda: save.prepare() if group.is_leader else None)
        save.run_phase("write", lambda: save.write(may_commit=worker.may_commit))
        committed = group.broadcast(f"the commit of step {step}", lambda: save.commit(run), channel=_CHANNEL)
    except ProcessError as error:
        # A process that does not answer may still be writing there; the next session removes what is left.
        may_remove = not error.missing
        raise
    finally:
        if group.is_leader and may_remove:
            shutil.rmtree(holder, ignore_errors=True)
    return Saved(
        step=step,
        path=root / committed["path"],
        total_bytes=committed["total_bytes"],
        seconds=time.monotonic() - start_time,
        stall_s=worker.stall_s,
        reason=job.summary.reason,
        deleted=tuple(committed["deleted"]),
        trouble=committed["trouble"],
    )


class _MultiprocessSave:
    """One process's part of one save."""

    def __init__(
        self, root: pathlib.Path, staged: pathlib.Path, spec: CheckpointSpec, job: write_step.Job, group: Group
    ) -> None:
        self._root, self._staged, self._spec, self._job, self._group = root, staged, spec, job, group
        self._algorithm = spec.integrity.digest

    @functools.cached_property
    def _snapshot(self) -> Snapshot:
        """The job's snapshot with the digests of the arrays that this process holds all of."""
        return write_step.add_digests(self._algorithm, self._job.snapshot)

    def run_phase(self, name: str, work: Callable[[], None]) -> None:
        """Do this process's work, and continue if no process failed; a barrier."""
        error: CheckpointError | None = None
        try:
            work()
        except CheckpointError as failure:
            error = failure
        except Exception as failure:
            error = write_step.make_save_error(self._root, self._job.summary.step, failure)
            error.__cause__ = failure
        self._group.raise_if_any_failed(f"step {self._job.summary.step}, {name}", error, channel=_CHANNEL)

    def prepare(self) -> None:
        """Make the directories, and publish the fingerprints of the leader's values; for the leader."""
        for name, item in self._snapshot.items.items():
            commit.make_directory(self._staged)
            if any(record.is_in_orbax for record in item.records):
                (self._staged / name).mkdir()
        fingerprints = _fingerprint_leaves(self._algorithm, self._snapshot)
        self._get_message_path("fingerprints").write_text(json.dumps(fingerprints))

    def write(self, *, may_commit: Callable[[], bool]) -> None:
        """Write and hash what this process holds."""
        with concurrent.futures.ThreadPoolExecutor(1, "ckpttools-digest") as pool:
            hashing = pool.submit(_hash_shards, self._algorithm, self._job.snapshot)
            orbax.write_shards(
                self._staged,
                self._job.snapshot,
                is_leader=self._group.is_leader,
                compression=self._spec.storage.compression,
            )
            slices = hashing.result()
        local: dict[str, manifest.Item] = {}
        if not self._group.is_leader:
            leader_fingerprints = json.loads(self._get_message_path("fingerprints").read_text())
            local = _collect_local_items(
                self._snapshot, _fingerprint_leaves(self._algorithm, self._snapshot), leader_fingerprints
            )
        part = {"slices": slices, "local": manifest.encode_items(local), "files": self._describe_own_files()}
        commit.write_file(self._get_message_path(f"part-{self._group.index}"), json.dumps(part).encode())
        if not may_commit():
            raise write_step.make_interrupted_error(self._job.summary.step)

    def commit(self, run: RunDirectory) -> dict[str, Any]:
        """Merge all parts into one step, commit it, and apply retention; for the leader."""
        try:
            return self._commit(run)
        except CheckpointError:
            raise
        except Exception as error:
            raise write_step.make_save_error(self._root, self._job.summary.step, error) from error

    def _commit(self, run: RunDirectory) -> dict[str, Any]:
        parts = [json.loads(self._get_message_path(f"part-{index}").read_text()) for index in range(self._group.count)]
        merged = self._merge_slices([part["slices"] for part in parts])
        with_arrays = [name for name, item in merged.items.items() if any(each.is_in_orbax for each in item.records)]
        orbax.finalize_shards(self._staged, with_arrays)
        local = {index: manifest.decode_items(part["local"]) for index, part in enumerate(parts) if part["local"]}
        write_step.finalize_step(
            self._staged,
            self._spec,
            self._job,
            merged,
            {name: (size, text) for part in parts for name, (size, text) in part["files"].items()},
            processes=self._group.count,
            local=local,
        )
        path = commit.commit_step(self._root, self._staged, self._job.summary.step)
        total_bytes, deleted, trouble = write_step.run_post_commit(run, self._spec, self._job, path)
        return {"path": path.name, "total_bytes": total_bytes, "deleted": list(deleted), "trouble": trouble}

    def _merge_slices(self, parts: list[dict[str, list[Any]]]) -> Snapshot:
        """The leader's snapshot with the digests of all shards."""
        items = {}
        for name, item in self._snapshot.items.items():
            found: dict[str, dict[Slice, str]] = {}
            for part in parts:
                for path, where, text in part[name]:
                    found.setdefault(_encode_path(path), {})[tuple((a, b) for a, b in where)] = text
            leaves = tuple(
                leaf
                if leaf.sharded_array is None
                else _add_slices(name, leaf, found.get(_encode_path(leaf.record.path), {}))
                for leaf in item.leaves
            )
            items[name] = SnapshotItem(leaves, item.skeletons)
        return Snapshot(items)

    def _describe_own_files(self) -> dict[str, tuple[int, str]]:
        """Size and digest of the files that this process has written and that no merge changes."""
        found = {}
        for name in self._job.snapshot.items:
            for parent, _, files in os.walk(self._staged / name / f"ocdbt.process_{self._group.index}"):
                for file in files:
                    path = pathlib.Path(parent, file)
                    text = digest.hash_file(self._algorithm, path)
                    found[path.relative_to(self._staged).as_posix()] = (path.stat().st_size, text)
        return found

    def _get_message_path(self, name: str) -> pathlib.Path:
        """A file for the other processes to read; beside the step, not in it."""
        return self._staged.parent / f"{name}.json"


def _add_slices(item: str, leaf: SnapshotLeaf, slices: Mapping[Slice, str]) -> SnapshotLeaf:
    digests = tuple(sorted(slices.items()))
    if leaf.sharded_array is None or not leaf_integrity.has_full_coverage(digests, leaf.sharded_array.shape):
        raise ProcessError(
            what=f"the {len(digests)} shards of {format_leaf_name(item, leaf.record.path)} are not the whole array.",
            why="one of its devices belongs to no process of this run; the step was not committed.",
            fix="shard the state over devices of the run's own processes.",
        )
    return dataclasses.replace(leaf, record=dataclasses.replace(leaf.record, slices=digests))


def _hash_shards(algorithm: str, snapshot: Snapshot) -> dict[str, list[Any]]:
    """By item: path, position and digest of each shard of which this process holds the first replica."""
    found: dict[str, list[Any]] = {name: [] for name in snapshot.items}
    for name, item in snapshot.items.items():
        for leaf in item.leaves:
            array = leaf.sharded_array
            for shard in array.addressable_shards if array is not None else ():
                if array is not None and shard.replica_id == 0:
                    where = [part.indices(size)[:2] for part, size in zip(shard.index, array.shape)]
                    text = digest.hash_array(algorithm, np.asarray(shard.data))
                    found[name].append([list(leaf.record.path), where, text])
    return found


def _fingerprint_leaves(algorithm: str, snapshot: Snapshot) -> LeafFingerprints:
    fingerprints: LeafFingerprints = {}
    for name, item in snapshot.items.items():
        found = fingerprints[name] = {}
        for leaf in item.leaves:
            record, is_sharded = leaf.record, leaf.sharded_array is not None
            if not is_below(record.path, item.skeletons):
                text = json.dumps(record.to_json()).encode()
                value = None if is_sharded else digest.hash_bytes(algorithm, text)
                found[_encode_path(record.path)] = [[record.kind, list(record.shape), record.dtype, is_sharded], value]
        for root, skeleton in item.skeletons.items():
            inside = [record.to_json() for record in item.records if is_below(record.path, [root])]
            value = digest.hash_bytes(algorithm, json.dumps([skeleton, inside]).encode())
            found[_encode_path(root)] = ["object", value]
    return fingerprints


def _collect_local_items(
    snapshot: Snapshot, own_fingerprints: LeafFingerprints, leader_fingerprints: LeafFingerprints
) -> dict[str, manifest.Item]:
    """Return the leaves and stateful objects whose values in this process differ from the leader's.

    Raises:
        StructureError: If the state has other leaves than the leader's.
        LeafError: If they are too large for a manifest.
    """
    _require_same_leaves(own_fingerprints, leader_fingerprints)
    found: dict[str, manifest.Item] = {}
    total = 0
    for name, item in snapshot.items.items():
        leader = leader_fingerprints[name]
        changed = {path for path, value in own_fingerprints[name].items() if value != leader[path]}
        skeletons = {root: skeleton for root, skeleton in item.skeletons.items() if _encode_path(root) in changed}
        records = []
        for leaf in item.leaves:
            record, array = leaf.record, leaf.host_array
            if _encode_path(record.path) in changed or is_below(record.path, skeletons):
                total += 0 if array is None else array.nbytes
                text = format_leaf_name(name, record.path)
                value = record.value if array is None else encode_value(text, array.tobytes())
                # Its bytes are in the manifest, whose own digest covers them.
                records.append(dataclasses.replace(record, value=value, digest=""))
        if records or skeletons:
            found[name] = manifest.Item(records=tuple(records), skeletons=skeletons)
    if total > _MAX_LOCAL_BYTES:
        raise LeafError(
            what=f"{total:,} bytes of this process's state differ from the leader's, in {', '.join(found)}.",
            why=f"they would be stored in the manifest, which takes at most {_MAX_LOCAL_BYTES:,} bytes per process.",
            fix="make a global array of them (jax.make_array_from_process_local_data), or leave them out.",
        )
    return found


def _require_same_leaves(own_fingerprints: LeafFingerprints, leader_fingerprints: LeafFingerprints) -> None:
    def list_forms(fingerprints: LeafFingerprints) -> set[str]:
        return {f"{item} {path} {value[0]}" for item, leaves in fingerprints.items() for path, value in leaves.items()}

    other = sorted(list_forms(own_fingerprints) ^ list_forms(leader_fingerprints))
    if other:
        raise StructureError(
            what=f"the states of this process and of the leader differ in {len(other)} leaves, such as {other[0]}.",
            why="one step is one state, of which each process holds a part.",
            fix="build the same state in every process.",
        )


def _encode_path(path: Path | list[str | int]) -> str:
    return json.dumps(list(path))
