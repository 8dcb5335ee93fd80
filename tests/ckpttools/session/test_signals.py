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

    with pytest.raises(KeyboardInterrupt):
        asked_twice()
    assert time.monotonic() - began < 15
    go_on.set()
