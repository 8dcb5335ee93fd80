# SPDX-License-Identifier: Apache-2.0
"""The order of the system calls: all is synced before the rename, nothing is deleted before the parent's sync."""

import os
import pathlib
import shutil

import jax.numpy as jnp

import ckpttools as ct
from ckpttools.store import commit, layout


class Recorder:
    """Notes every fsync, rename and deletion, in order, with the inode that was meant."""

    def __init__(self, monkeypatch):
        self.events = []
        fsync, rename, rmtree = os.fsync, os.rename, shutil.rmtree

        def record_fsync(descriptor):
            self.events.append(("fsync", pathlib.Path(os.readlink(f"/proc/self/fd/{descriptor}"))))
            fsync(descriptor)

        def record_rename(source, target, **options):
            self.events.append(("rename", pathlib.Path(source), pathlib.Path(target)))
            rename(source, target, **options)

        def record_rmtree(path, *args, **options):
            self.events.append(("delete", pathlib.Path(path)))
            rmtree(path, *args, **options)

        monkeypatch.setattr(os, "fsync", record_fsync)
        monkeypatch.setattr(os, "rename", record_rename)
        monkeypatch.setattr(shutil, "rmtree", record_rmtree)

    def index(self, *event):
        return self.events.index(event)


def test_a_commit_syncs_renames_syncs_the_parent_then_deletes(tmp_path, monkeypatch):
    spec = ct.CheckpointSpec(directory=tmp_path / "run", keep=ct.Latest(2), storage=ct.Storage(asynchronous=False))
    with ct.open(spec) as ckpt:
        for step in (1, 2):
            ckpt.save(step, {"model": {"w": jnp.arange(100.0)}})
        recorder = Recorder(monkeypatch)
        ckpt.save(3, {"model": {"w": jnp.arange(100.0)}})
        monkeypatch.undo()
        root = tmp_path / "run"
        assert ckpt.all_steps() == (2, 3)
    (commit_at,) = [n for n, event in enumerate(recorder.events) if event[0] == "rename" and event[-1] == root / "3"]
    staged = recorder.events[commit_at][1]
    before = {event[1] for event in recorder.events[:commit_at] if event[0] == "fsync"}
    needed = {staged / path.relative_to(root / "3") for path in (root / "3").rglob("*")} | {staged}
    assert needed <= before, "a file or folder of the step was not synced before the rename"
    after = [event for event in recorder.events[commit_at:] if event[0] == "fsync"]
    assert {root, staged.parent} <= {event[1] for event in after}
    parent_synced = recorder.events.index(("fsync", root), commit_at)
    trashed = next(n for n, event in enumerate(recorder.events) if event[0] == "rename" and event[1] == root / "1")
    deleted = next(n for n, event in enumerate(recorder.events) if event[0] == "delete" and "trash" in str(event[1]))
    assert commit_at < parent_synced < trashed < deleted
    assert not any(event[0] == "delete" for event in recorder.events[:parent_synced])


def test_the_next_writer_removes_what_a_killed_process_left(tmp_path):
    spec = ct.CheckpointSpec(directory=tmp_path)
    with ct.open(spec) as ckpt:
        ckpt.save(1, {"w": jnp.ones(2)})
    for part in ("staging/2-abcd/2", "trash/1"):
        folder = layout.get_control_path(tmp_path, part)
        folder.mkdir(parents=True)
        (folder / "left").write_text("x")
    layout.get_control_path(tmp_path, "notes.json.new").write_text("x")
    with ct.open(spec) as ckpt:
        ckpt.restore({"w": jnp.ones(2)})
        ckpt.steps(5)
    assert not layout.get_control_path(tmp_path, "notes.json.new").exists()
    assert not list(layout.get_control_path(tmp_path, "staging").iterdir())
    assert not list(layout.get_control_path(tmp_path, "trash").iterdir())


def test_a_reader_sweeps_nothing(tmp_path):
    spec = ct.CheckpointSpec(directory=tmp_path)
    with ct.open(spec) as writer:
        writer.save(1, {"w": jnp.ones(2)})
        writer.wait()
        folder = layout.get_control_path(tmp_path, "staging/9-live")
        folder.mkdir(parents=True)
        with ct.open(spec) as reader:
            reader.restore({"w": jnp.ones(2)})
        assert folder.exists()


def test_small_files_are_replaced_in_one_step(tmp_path):
    path = tmp_path / "folder" / "pins.json"
    commit.write_file(path, b"one")
    commit.write_file(path, b"two")
    assert path.read_bytes() == b"two"
    assert [entry.name for entry in path.parent.iterdir()] == ["pins.json"]
