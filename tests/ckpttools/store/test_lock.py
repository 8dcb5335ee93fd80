# SPDX-License-Identifier: Apache-2.0
"""One writer for each run, also on a disk that is full or knows no locks."""

import contextlib
import errno
import fcntl
import os

import numpy as np
import pytest

import ckpttools as ct
from ckpttools.store.lock import WriterLock


def failing(code):
    def fail(*_args):
        raise OSError(code, os.strerror(code))

    return fail


@pytest.mark.parametrize("call", ["write", "ftruncate"])
def test_a_lock_is_acquired_on_a_full_disk(tmp_path, monkeypatch, call):
    lock = WriterLock(tmp_path)
    monkeypatch.setattr(os, call, failing(errno.ENOSPC))
    lock.acquire()
    monkeypatch.undo()
    other = WriterLock(tmp_path)
    with pytest.raises(ct.RunInUseError, match="is being written by process unknown"):
        other.acquire()
    lock.release()
    other.acquire()
    other.release()


def test_a_file_system_without_locks_is_not_another_writer(tmp_path, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", failing(errno.ENOLCK))
    lock = WriterLock(tmp_path)
    with pytest.raises(ct.StorageError, match="cannot be locked") as caught:
        lock.acquire()
    assert not isinstance(caught.value, ct.RunInUseError)
    assert not lock.is_held
    monkeypatch.undo()
    lock.acquire()
    lock.release()


def test_the_control_another_writer(tmp_path):
    first, second = WriterLock(tmp_path), WriterLock(tmp_path)
    first.acquire()
    with pytest.raises(ct.RunInUseError, match=f"is being written by process {os.getpid()}"):
        second.acquire()
    first.release()


@pytest.fixture
def umask():
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


@pytest.mark.parametrize(
    ("mask", "extra"), [(0o002, 0o2000), (0o077, 0), (0o022, 0)], ids=["group", "private", "usual"]
)
def test_every_file_and_directory_follows_the_umask(tmp_path, umask, mask, extra):
    umask(mask)
    group = tmp_path / "group"
    group.mkdir()
    group.chmod(0o777 & ~mask | extra)
    spec = ct.CheckpointSpec(directory=group / "run", mirror=f"file://{group}/copies")
    with ct.open(spec) as ckpt:
        for step in (1, 2):
            ckpt.save(step, {"item": {"w": np.arange(70_000.0), "none": None}}, {"loss": 0.5})
        ckpt.wait()
        ckpt.pin(1)
    ct.fetch_step(group / "fetched", f"file://{group}/copies")
    wrong = {
        str(path): oct(path.stat().st_mode & 0o7777)
        for path in group.rglob("*")
        if path.stat().st_mode & 0o7777 != ((0o777 & ~mask | extra) if path.is_dir() else 0o666 & ~mask)
    }
    assert wrong == {}


@contextlib.contextmanager
def become_colleague(group=65534):
    groups = os.getgroups()
    os.setgroups([])
    os.setegid(group)
    os.seteuid(12345)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)
        os.setgroups(groups)


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user")
@pytest.mark.parametrize("is_old_lock", [False, True], ids=["new lock", "lock of an earlier version"])
def test_a_colleague_of_the_same_group_goes_on(tmp_path, umask, is_old_lock):
    umask(0o002)
    for place in (tmp_path, *tmp_path.parents[:3]):
        place.chmod(0o755)
    run = tmp_path / "shared" / "run"
    run.parent.mkdir()
    os.chown(run.parent, 0, 65534)
    run.parent.chmod(0o2775)
    spec = ct.CheckpointSpec(directory=run, save=ct.EverySteps(1), storage=ct.Storage(asynchronous=False))
    with ct.open(spec) as ckpt:
        ckpt.step(1, {"item": np.ones(3)})
    if is_old_lock:
        (run / ".ckpttools" / "lock").chmod(0o644)
    with become_colleague():
        lock = WriterLock(run)
        lock.acquire()
        lock.release()
        with ct.open(spec) as ckpt:
            ckpt.restore({"item": np.zeros(3)})
            assert isinstance(ckpt.step(2, {"item": np.ones(3)}), ct.Saved)
    with become_colleague(group=12345), pytest.raises(ct.StorageError):  # control: a stranger cannot
        WriterLock(run).acquire()
