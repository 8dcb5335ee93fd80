# SPDX-License-Identifier: Apache-2.0
"""SIGTERM, SIGINT and preemption notices: save the step, end the loop, restore the handlers."""

import os
import signal
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ckpttools as ct
from ckpttools.store import orbax

from .runs import spec_for


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_a_signal_saves_the_step_and_ends_the_loop(tmp_path, number):
    params, seen = {"params": jnp.ones(2)}, []
    before = signal.getsignal(number)
    assert before != signal.SIG_IGN, "a signal that is ignored stays so; do not start these tests in the background"
    with ct.open(spec_for(tmp_path, save=ct.EverySteps(100))) as ckpt:
        for step in ckpt.steps(50):
            if step == 3:
                os.kill(os.getpid(), number)
            seen.append(ckpt.step(step, params))
        assert ckpt.preempted
    assert [type(outcome).__name__ for outcome in seen] == ["Skipped", "Skipped", "Saved"]
    assert "asked to stop" in seen[-1].reason
    assert signal.getsignal(number) is before


def test_a_preemption_notice_saves_and_ends_the_loop(tmp_path, monkeypatch):
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr("jax.experimental.multihost_utils.reached_preemption_sync_point", lambda step: step == 3)
    with ct.open(spec_for(tmp_path, save=ct.EverySteps(100))) as ckpt:
        outcomes = [ckpt.step(step, {"params": jnp.ones(2)}) for step in ckpt.steps(50)]
    assert outcomes[-1].reason == "a preemption notice asked to stop"
    assert len(outcomes) == 3


def test_the_previous_handlers_are_restored_after_the_last_step(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    with ct.open(spec_for(tmp_path)) as ckpt:
        for step in ckpt.steps(2):
            ckpt.step(step, {"x": jnp.ones(3)})
            assert signal.getsignal(signal.SIGTERM) is not before
        assert signal.getsignal(signal.SIGTERM) is before


def test_a_signal_that_the_program_ignores_stays_ignored(tmp_path):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with ct.open(spec_for(tmp_path)) as ckpt:
            next(ckpt.steps(3))
            signal.raise_signal(signal.SIGINT)
            assert not ckpt.preempted
            assert signal.getsignal(signal.SIGTERM) != signal.SIG_DFL
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_second_signal_does_not_wait_for_a_save(tmp_path, monkeypatch):
    go_on = threading.Event()
    monkeypatch.setattr(orbax, "write", lambda *_args, **_kwargs: go_on.wait(30))
    began = time.monotonic()

    def asked_twice():
        with ct.open(spec_for(tmp_path, save=ct.EverySteps(1))) as ckpt:
            for step in ckpt.steps(3):
                ckpt.step(step, {"w": np.ones(2)})
                signal.raise_signal(signal.SIGINT)
                signal.raise_signal(signal.SIGINT)
                time.sleep(20)

    with pytest.warns(ct.CheckpointWarning, match="the save of step 1 has not ended"), pytest.raises(KeyboardInterrupt):
        asked_twice()
    assert time.monotonic() - began < 15
    go_on.set()


def test_every_session_of_the_process_is_asked_and_saves(tmp_path):
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    sessions = [ct.open(spec_for(tmp_path / name, save=ct.EverySteps(100))) for name in "ab"]
    for ckpt in sessions:
        ckpt.step(1, {"w": np.ones(2)})
    signal.raise_signal(signal.SIGTERM)
    assert [ckpt.preempted for ckpt in sessions] == [True, True]
    assert [type(ckpt.step(2, {"w": np.ones(2)})) for ckpt in sessions] == [ct.Saved, ct.Saved]
    for ckpt in sessions:  # in the order in which they were opened
        ckpt.close()
    assert {number: signal.getsignal(number) for number in before} == before


def test_a_session_that_is_closed_hears_no_later_signal(tmp_path):
    closed, opened = (ct.open(spec_for(tmp_path / name)) for name in "ab")
    for ckpt in (closed, opened):
        ckpt.step(1, {"w": np.ones(2)})
    closed.close()
    signal.raise_signal(signal.SIGINT)
    assert (closed.preempted, opened.preempted) == (False, True)
    opened.close()


def test_a_handler_that_was_installed_meanwhile_stays(tmp_path):
    before, calls = signal.getsignal(signal.SIGTERM), []
    try:
        with ct.open(spec_for(tmp_path)) as ckpt:
            ckpt.step(1, {"w": np.ones(2)})
            ours = signal.getsignal(signal.SIGTERM)

            def handle(number, frame):
                calls.append(number)
                ours(number, frame)

            signal.signal(signal.SIGTERM, handle)
            ckpt.step(2, {"w": np.ones(2)})
            signal.raise_signal(signal.SIGTERM)
            assert ckpt.preempted, "it was passed on to this package"
        assert signal.getsignal(signal.SIGTERM) is handle
        signal.signal(signal.SIGTERM, ours)  # what a library does at its end
        with ct.open(spec_for(tmp_path / "b")) as ckpt:
            ckpt.step(1, {"w": np.ones(2)})
            signal.raise_signal(signal.SIGTERM)
            assert ckpt.preempted
        assert len(calls) == 1
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_signal_without_a_session_goes_to_the_first_handler(tmp_path):
    calls = []
    before = signal.signal(signal.SIGUSR1, lambda *_: calls.append("first"))
    try:
        with ct.open(spec_for(tmp_path), signals=["SIGUSR1"]) as ckpt:
            ckpt.step(1, {"w": np.ones(2)})
            ours = signal.getsignal(signal.SIGUSR1)
            signal.signal(signal.SIGUSR1, lambda *args: (calls.append("later"), ours(*args)))
        signal.raise_signal(signal.SIGUSR1)
        assert calls == ["later", "first"]
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_configured_signals_ask_and_others_do_not(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    with ct.open(spec_for(tmp_path), signals=["SIGUSR1", signal.SIGUSR2]) as ckpt:
        for step in ckpt.steps(10):
            assert signal.getsignal(signal.SIGTERM) is before
            if step == 2:
                signal.raise_signal(signal.SIGUSR1)
            outcome = ckpt.step(step, {"w": np.ones(2)})
    assert (outcome.step, outcome.reason) == (2, "SIGUSR1 asked to stop")
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL


@pytest.mark.parametrize("name", ["SIGKILL", "SIGNOTHING", 0])
def test_a_signal_that_cannot_be_handled_is_refused(tmp_path, name):
    with pytest.raises(ct.SpecError, match=r"cannot be handled|is not a signal"):
        ct.open(spec_for(tmp_path), signals=[name])


def test_a_stop_can_be_requested_from_a_thread(tmp_path):
    with ct.open(spec_for(tmp_path, save=ct.EverySteps(100)), signals=()) as ckpt:
        for step in ckpt.steps(50):
            if step == 3:
                thread = threading.Thread(target=ckpt.request_stop, args=("no time left",))
                thread.start()
                thread.join()
            outcome = ckpt.step(step, {"w": np.ones(2)})
    assert (outcome.step, outcome.reason) == (3, "no time left")
    assert ckpt.preempted
