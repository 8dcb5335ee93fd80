# SPDX-License-Identifier: Apache-2.0
"""A save in a thread: its result or error, and waits that end."""

import _thread
import pathlib
import signal
import sys
import threading
import time

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


class Interrupt(BaseException):
    """What a signal handler raises."""


def interrupt_after(seconds, call):
    """Make a call that a signal handler interrupts with an exception."""

    def handle(*_):
        raise Interrupt

    before = signal.signal(signal.SIGALRM, handle)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        with pytest.raises(Interrupt):
            call()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("waits_with_join", [False, True], ids=["worker", "control: Thread.join"])
def test_an_interrupted_wait_takes_no_running_save_for_ended(waits_with_join):
    proceed = threading.Event()
    if waits_with_join:
        if sys.version_info >= (3, 13):
            pytest.skip("Thread.join marks an interrupted thread as ended before Python 3.13 only")
        thread = threading.Thread(target=proceed.wait, args=(20,))
        thread.start()
        interrupt_after(0.1, lambda: thread.join(10))
        assert not thread.is_alive(), "it is running all the same"
        proceed.set()
        return
    worker = Worker(3, lambda worker: proceed.wait(20) and make_saved(worker.step))
    worker.start()
    interrupt_after(0.1, lambda: worker.wait(10))
    assert not worker.has_ended
    proceed.set()
    worker.wait(10)
    assert worker.get_result() == make_saved(3)


def commit(committed, worker):
    committed.append(worker.may_commit())
    return make_saved(worker.step)


@pytest.mark.parametrize("waits", [True, False])
def test_live_arrays_are_committed_only_while_their_caller_waits(waits):
    committed = []
    worker = Worker(3, lambda worker: commit(committed, worker), asks_before_commit=True)
    worker.start()
    if not waits:
        worker.leave()
    worker.wait(10)
    assert committed == [waits]
    assert worker.was_left is not waits


def test_a_save_of_copies_commits_without_its_caller():
    committed = []
    worker = Worker(3, lambda worker: commit(committed, worker))
    worker.start()
    worker.leave()
    worker.wait(10)
    assert committed == [True]


def test_nobody_answers_and_nothing_is_committed():
    committed = []
    worker = Worker(3, lambda worker: commit(committed, worker), asks_before_commit=True, timeout_s=0.05)
    worker.start()
    for _ in range(200):
        if worker.has_ended:
            break
        time.sleep(0.05)
    assert committed == [False]


@pytest.mark.parametrize("has_launched", [False, True], ids=["before the thread", "after it"])
def test_an_interrupted_start_runs_once_or_never(monkeypatch, has_launched):
    ran, real = [], _thread.start_new_thread

    def interrupted(function, arguments):
        if has_launched:
            real(function, arguments)
            time.sleep(0.2)
        raise Interrupt

    worker = Worker(3, lambda worker: (ran.append(1), make_saved(worker.step))[1])
    monkeypatch.setattr(_thread, "start_new_thread", interrupted)
    with pytest.raises(Interrupt):
        worker.start()
    worker.wait(10)
    assert ran == [1] * has_launched
    assert worker.was_cancelled is not has_launched
    assert worker.get_result() == (make_saved(3) if has_launched else None)
