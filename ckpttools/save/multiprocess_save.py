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
from ..store.run_directory import RunFolder
from ..tree.leaves import Path, Record, Slice, dotted, encode_value
from ..tree.match import below
from ..tree.snapshot import Snapshot
from . import write_step
from .outcomes import Saved
from .worker import Worker

_CHANNEL = "save"
_LARGEST_LOCAL_BYTES = 16 << 20

type Marks = dict[str, dict[str, Any]]
"""By item, for each leaf and stateful object of which a process sees all: its form and a digest of its value."""


def run(
    folder: RunFolder, spec: CheckpointSpec, job: write_step.Job, worker: Worker, began: float, group: Group
) -> Saved:
    """The part of a save that may go on in the background; called by all processes.

    Raises:
        ProcessError: If another process failed or is missing; then nothing was committed.
    """
    root, step = folder.directory, job.summary.step
    holder = layout.control(root, f"staging/{job.staging}")
    staged = holder / str(step)
    save, may_remove = _Save(root, staged, spec, job, group), True
    try:
        save.meet("begin", lambda: save.begin() if group.leads else None)
        save.meet("write", lambda: save.write(abandoned=worker.abandoned.is_set))
        done = group.decide(f"the commit of step {step}", lambda: save.commit(folder), channel=_CHANNEL)
    except ProcessError as error:
        # Who is not heard of may still be writing there; the next session sweeps it up.
        may_remove = not error.missing
        raise
    finally:
        if group.leads and may_remove:
            shutil.rmtree(holder, ignore_errors=True)
    return Saved(
        step=step,
        path=root / done["path"],
        total_bytes=done["total_bytes"],
        seconds=time.monotonic() - began,
        stall_s=worker.stall_s,
        reason=job.summary.reason,
        deleted=tuple(done["deleted"]),
        trouble=done["trouble"],
    )


class _Save:
    """One process's part of one save."""

    def __init__(
        self, root: pathlib.Path, staged: pathlib.Path, spec: CheckpointSpec, job: write_step.Job, group: Group
    ) -> None:
        self._root, self._staged, self._spec, self._job, self._group = root, staged, spec, job, group
        self._algorithm = spec.integrity.digest

    def meet(self, name: str, work: Callable[[], None]) -> None:
        """Do something, and go on if all could do it."""
        error: CheckpointError | None = None
        try:
            work()
        except CheckpointError as failure:
            error = failure
        except Exception as failure:
            error = write_step.explained(self._root, self._job.summary.step, failure)
            error.__cause__ = failure
        self._group.agree(f"step {self._job.summary.step}, {name}", error, channel=_CHANNEL)

    def begin(self) -> None:
        """Make the folders, and tell what the leader's values are; for the leader."""
        for item, records in self._job.snapshot.records.items():
            commit.make_folder(self._staged)
            if any(record.in_orbax for record in records):
                (self._staged / item).mkdir()
        self._file("marks").write_text(json.dumps(_marks(self._algorithm, self._job.snapshot)))

    def write(self, *, abandoned: Callable[[], bool]) -> None:
        """Write and digest what this process holds."""
        snapshot = self._job.snapshot
        arrays: dict[str, dict[Path, Any]] = {
            item: {**spread, **(snapshot.arrays[item] if self._group.leads else {})}
            for item, spread in snapshot.spread.items()
        }
        with concurrent.futures.ThreadPoolExecutor(1, "ckpttools-digest") as pool:
            hashing = pool.submit(_slices, self._algorithm, snapshot)
            orbax.write_part(self._staged, snapshot.records, arrays, compression=self._spec.storage.compression)
            slices = hashing.result()
        local: dict[str, manifest.Item] = {}
        if not self._group.leads:
            theirs = json.loads(self._file("marks").read_text())
            local = _differing(snapshot, _marks(self._algorithm, snapshot), theirs)
        part = {"slices": slices, "local": manifest.items_json(local), "files": self._own_files()}
        commit.write_file(self._file(f"part-{self._group.index}"), json.dumps(part).encode())
        if abandoned():
            raise StorageError(
                what=f"step {self._job.summary.step} was not committed.",
                why="its wait had timed out before.",
                fix="nothing: the next save writes a whole step. Storage(timeout_s=...) waits longer.",
            )

    def commit(self, folder: RunFolder) -> dict[str, Any]:
        """Make one step of all parts, commit it, and delete what nobody keeps; for the leader."""
        try:
            return self._commit(folder)
        except CheckpointError:
            raise
        except Exception as error:
            raise write_step.explained(self._root, self._job.summary.step, error) from error

    def _commit(self, folder: RunFolder) -> dict[str, Any]:
        parts = [json.loads(self._file(f"part-{index}").read_text()) for index in range(self._group.count)]
        records = self._merged([part["slices"] for part in parts])
        with_arrays = [item for item, leaves in records.items() if any(record.in_orbax for record in leaves)]
        orbax.finish_parts(self._staged, with_arrays)
        local = {index: manifest.items_from(part["local"]) for index, part in enumerate(parts) if part["local"]}
        write_step.prove(
            self._staged,
            self._spec,
            self._job,
            records,
            {name: (size, mark) for part in parts for name, (size, mark) in part["files"].items()},
            processes=self._group.count,
            local=local,
        )
        path = commit.commit_step(self._root, self._staged, self._job.summary.step)
        total_bytes, deleted, trouble = write_step.settle(folder, self._spec, self._job, path)
        return {"path": path.name, "total_bytes": total_bytes, "deleted": list(deleted), "trouble": trouble}

    def _merged(self, parts: list[dict[str, list[Any]]]) -> dict[str, tuple[Record, ...]]:
        """The leader's records with the digests of all parts."""
        snapshot, merged = self._job.snapshot, {}
        for item, records in write_step.with_digests(self._algorithm, snapshot).items():
            found: dict[str, dict[Slice, str]] = {}
            for part in parts:
                for path, where, mark in part[item]:
                    found.setdefault(_text(path), {})[tuple((a, b) for a, b in where)] = mark
            merged[item] = tuple(
                self._whole(item, record, found.get(_text(record.path), {}))
                if record.path in snapshot.spread[item]
                else record
                for record in records
            )
        return merged

    def _whole(self, item: str, record: Record, slices: Mapping[Slice, str]) -> Record:
        marks = tuple(sorted(slices.items()))
        if not integrity.covers(marks, self._job.snapshot.spread[item][record.path].shape):
            raise ProcessError(
                what=f"the {len(marks)} parts of {dotted(item, record.path)} are not the whole of it.",
                why="a device of it belongs to no process of this run; the step was not committed.",
                fix="shard the state over devices of the run's own processes.",
            )
        return dataclasses.replace(record, slices=marks)

    def _own_files(self) -> dict[str, tuple[int, str]]:
        """Size and digest of the files that this process has written and that stay as they are."""
        folder = f"ocdbt.process_{self._group.index}"
        found = {}
        for item in self._job.snapshot.records:
            for parent, _, names in os.walk(self._staged / item / folder):
                for name in names:
                    path = pathlib.Path(parent, name)
                    mark = digest.of_file(self._algorithm, path)
                    found[path.relative_to(self._staged).as_posix()] = (path.stat().st_size, mark)
        return found

    def _file(self, name: str) -> pathlib.Path:
        """A file that the processes tell each other something in; it lies beside the step, not in it."""
        return self._staged.parent / f"{name}.json"


def _slices(algorithm: str, snapshot: Snapshot) -> dict[str, list[Any]]:
    """For each item: path, place and digest of every part of an array that this process is the first to hold."""
    found: dict[str, list[Any]] = {item: [] for item in snapshot.spread}
    for item, arrays in snapshot.spread.items():
        for path, array in arrays.items():
            for shard in array.addressable_shards:
                if shard.replica_id == 0:
                    where = [part.indices(size)[:2] for part, size in zip(shard.index, array.shape)]
                    found[item].append([list(path), where, digest.of_array(algorithm, np.asarray(shard.data))])
    return found


def _marks(algorithm: str, snapshot: Snapshot) -> Marks:
    marks: Marks = {}
    for item, records in write_step.with_digests(algorithm, snapshot).items():
        roots, spread = snapshot.skeletons[item], snapshot.spread[item]
        marks[item] = {}
        for record in records:
            if not below(record.path, roots):
                text = json.dumps(record.to_json()).encode()
                value = None if record.path in spread else digest.of_bytes(algorithm, text)
                form = [record.kind, list(record.shape), record.dtype, record.path in spread]
                marks[item][_text(record.path)] = [form, value]
        for root, skeleton in roots.items():
            inside = [record.to_json() for record in records if below(record.path, [root])]
            marks[item][_text(root)] = ["object", digest.of_bytes(algorithm, json.dumps([skeleton, inside]).encode())]
    return marks


def _differing(snapshot: Snapshot, mine: Marks, theirs: Marks) -> dict[str, manifest.Item]:
    """What this process has to keep of its own.

    Raises:
        StructureError: If its state has other leaves than the leader's.
        LeafError: If it is too much for a manifest.
    """
    _require_same_leaves(mine, theirs)
    found: dict[str, manifest.Item] = {}
    total = 0
    for item, marks in mine.items():
        changed = {path for path, mark in marks.items() if mark != theirs[item][path]}
        skeletons = {root: skeleton for root, skeleton in snapshot.skeletons[item].items() if _text(root) in changed}
        records = []
        for record in snapshot.records[item]:
            if _text(record.path) in changed or below(record.path, skeletons):
                array = snapshot.arrays[item].get(record.path)
                total += 0 if array is None else array.nbytes
                value = record.value if array is None else encode_value(dotted(item, record.path), array.tobytes())
                records.append(dataclasses.replace(record, value=value))
        if records or skeletons:
            found[item] = manifest.Item(records=tuple(records), skeletons=skeletons)
    if total > _LARGEST_LOCAL_BYTES:
        raise LeafError(
            what=f"this process has {total:,} bytes of its own that differ from the leader's: {', '.join(found)}.",
            why=f"they would stand in the manifest, which holds at most {_LARGEST_LOCAL_BYTES:,} bytes for each.",
            fix="make a global array of them (jax.make_array_from_process_local_data), or leave them out.",
        )
    return found


def _require_same_leaves(mine: Marks, theirs: Marks) -> None:
    def forms(marks: Marks) -> set[str]:
        return {f"{item} {path} {mark[0]}" for item, leaves in marks.items() for path, mark in leaves.items()}

    other = sorted(forms(mine) ^ forms(theirs))
    if other:
        raise StructureError(
            what=f"this process and the leader pass in states that differ in {len(other)} leaves, such as {other[0]}.",
            why="one step is one state, of which each process holds a part.",
            fix="build the same state in every process.",
        )


def _text(path: Path | list[str | int]) -> str:
    return json.dumps(list(path))
