# SPDX-License-Identifier: Apache-2.0
"""Calls outside the main thread: results, errors, context, interrupts."""

import contextvars
import signal
import threading
import time

import pytest

from ckpttools.threads import run_outside_main_thread

LEVEL = contextvars.ContextVar("level", default=0)


class Interrupt(BaseException):
    pass


def test_the_call_runs_in_another_thread_with_the_callers_context():
    LEVEL.set(3)
    thread, level = run_outside_main_thread(lambda: (threading.get_ident(), LEVEL.get()))
    assert thread != threading.get_ident()
    assert level == 3


def test_an_error_is_raised_in_the_caller():
    with pytest.raises(ZeroDivisionError):
        run_outside_main_thread(lambda: 1 // 0)


def test_a_call_from_another_thread_stays_in_it():
    idents = []

    def call():
        idents.append(threading.get_ident())
        idents.append(run_outside_main_thread(threading.get_ident))

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    assert idents[0] == idents[1]


def test_an_interrupt_leaves_the_call_alone():
    ended = threading.Event()

    def work():
        time.sleep(0.3)
        ended.set()

    def interrupt(*_):
        raise Interrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        with pytest.raises(Interrupt):
            run_outside_main_thread(work)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert not ended.is_set()
    assert ended.wait(10)
