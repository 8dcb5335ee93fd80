# SPDX-License-Identifier: Apache-2.0
"""A save in a thread: its result or error, and waits that end."""

import pathlib
import threading

import pytest

import ckpttools as ct
from ckpttools.save.worker import Worker


def make_saved(step):
    return ct.Saved(step=step, path=pathlib.Path("run") / str(step), total_bytes=0, seconds=0, stall_s=0, reason="x")


def test_the_result_is_that_of_the_save():
    worker = Worker(3, lambda worker: make_saved(worker.step))
    worker.start()
    worker.wait(10)
    assert worker.has_ended
    assert worker.error is None
    assert worker.get_result() == make_saved(3)


def test_an_error_is_shown_before_it_is_raised():
    def fail(worker):
        raise ct.StorageError(what="a disk failed.", why="", fix="")

    worker = Worker(3, fail)
    worker.start()
    worker.wait(10)
    assert isinstance(worker.error, ct.StorageError)
    with pytest.raises(ct.StorageError, match="a disk failed"):
        worker.get_result()


def test_a_wait_times_out_and_callbacks_run_at_the_end():
    proceed, calls = threading.Event(), []

    def block(worker):
        proceed.wait(10)
        return make_saved(worker.step)

    worker = Worker(3, block)
    worker.start()
    worker.add_done_callback(lambda: calls.append("early"))
    with pytest.raises(ct.SaveTimeoutError, match=r"step 3 has not ended after 0\.01 s"):
        worker.wait(0.01)
    assert not worker.has_ended
    assert calls == []
    proceed.set()
    worker.wait(10)
    worker.add_done_callback(lambda: calls.append("late"))
    assert calls == ["early", "late"]
