# SPDX-License-Identifier: Apache-2.0
"""One writer for each run, also on a disk that is full or knows no locks."""

import errno
import fcntl
import os

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
