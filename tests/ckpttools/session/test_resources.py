# SPDX-License-Identifier: Apache-2.0
"""Readers, writers, pins: what a session holds while a run is open."""

import subprocess
import sys
import threading

import jax.numpy as jnp
import numpy as np
import pytest

import ckpttools as ct
from ckpttools.save.worker import Worker
from ckpttools.store import orbax
from ckpttools.tree import snapshot

from .runs import spec_for

HOLD_A_RUN = """
import sys, ckpttools as ct
with ct.open(ct.CheckpointSpec(directory=sys.argv[1])) as ckpt:
    ckpt.restore({"params": [0.0]})
    ckpt.steps(9)
    print("ready", flush=True)
    sys.stdin.read()
"""


def test_a_second_process_may_read_but_not_write(tmp_path):
    params = {"params": [1.0]}
    with ct.open(spec_for(tmp_path)) as ckpt:
        ckpt.save(1, params)
    command = [sys.executable, "-c", HOLD_A_RUN, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n"
        with ct.open(spec_for(tmp_path)) as reader:
            assert reader.restore(params).step == 1
            with pytest.raises(ct.RunInUseError, match=f"is being written by process {writer.pid}"):
                reader.save(2, params)
        writer.communicate("")
    with ct.open(spec_for(tmp_path)) as ckpt:
        ckpt.restore(params)
        ckpt.save(2, params)


def test_a_later_session_of_the_process_replaces_an_earlier_one(tmp_path):
    params = {"params": jnp.ones(2)}
    earlier = ct.open(spec_for(tmp_path))
    earlier.save(1, params)
    with ct.open(spec_for(tmp_path)) as later:
        assert later.restore(params).step == 1, "the save in progress is waited for"
        later.save(2, params)
        later.wait()
        with pytest.raises(ct.RunInUseError, match="a later session"):
            earlier.save(3, params)
        assert later.all_steps() == (1, 2)


def test_a_restore_finds_the_step_of_an_interrupted_close(tmp_path, monkeypatch):
    params, real = {"params": jnp.ones(2)}, orbax.write
    is_interrupted = threading.Event()

    def write(*args, **options):
        is_interrupted.wait(20)
        real(*args, **options)

    def interrupt(*_args):
        is_interrupted.set()
        raise KeyboardInterrupt

    monkeypatch.setattr(orbax, "write", write)
    earlier = ct.open(spec_for(tmp_path))
    earlier.save(1, params)
    real_wait = Worker.wait
    monkeypatch.setattr(Worker, "wait", interrupt)
    with pytest.raises(KeyboardInterrupt):
        earlier.close()
    monkeypatch.setattr(Worker, "wait", real_wait)
    with ct.open(spec_for(tmp_path)) as later:
        assert later.restore(params).step == 1
        assert isinstance(later.save(2, params), ct.Started)


def test_a_session_in_a_call_is_not_replaced(tmp_path, monkeypatch):
    real, errors = snapshot.take, []

    def open_another(state, buffers, rules):
        monkeypatch.undo()
        with ct.open(spec_for(tmp_path)) as later, pytest.raises(ct.RunInUseError, match="another session") as caught:
            later.save(9, state)
        errors.append(caught.value)
        return real(state, buffers, rules)

    with ct.open(spec_for(tmp_path)) as ckpt:
        monkeypatch.setattr(snapshot, "take", open_another)
        ckpt.save(1, {"params": jnp.ones(2)})
        ckpt.wait()
        assert ckpt.all_steps() == (1,)
    assert len(errors) == 1


def test_a_reader_blocks_no_writer_and_sees_its_steps(tmp_path):
    params = {"params": jnp.ones(2)}
    with ct.open(spec_for(tmp_path)) as ckpt:
        ckpt.save(1, params)
    with ct.open(spec_for(tmp_path)) as reader:
        reader.restore(params)
        with ct.open(spec_for(tmp_path)) as writer:
            writer.restore(params)
            writer.save(2, params)
            writer.wait()
            assert reader.latest_step() == 2
        # The other went on with the run since this one's restore.
        with pytest.raises(ct.NotRestoredError, match="since this session restored it"):
            reader.save(3, params)
        assert reader.restore(params).step == 2
        reader.save(3, params)
        reader.wait()
        assert reader.all_steps() == (1, 2, 3)


def test_a_fresh_start_beside_steps_of_another_session_is_refused(tmp_path):
    params = {"params": jnp.ones(2)}
    with ct.open(spec_for(tmp_path)) as early:
        assert early.restore(params).step is None
        with ct.open(spec_for(tmp_path)) as other:
            other.save(1000, params)
        with pytest.raises(ct.NotRestoredError, match="since this session restored it"):
            early.save(1, params)
    assert [step.step for step in ct.ls(tmp_path)] == [1000]


def test_pinning_something_other_than_a_step_is_refused(tmp_path):
    with ct.open(spec_for(tmp_path)) as ckpt:
        ckpt.save(1, {"w": np.ones(2)})
        with pytest.raises(ct.StepNotFoundError):
            ckpt.pin(np.int64(1))


def test_pins_and_best(tmp_path):
    params = {"params": jnp.ones(2)}
    spec = spec_for(tmp_path, save=ct.EverySteps(1), keep=ct.Latest(2) | ct.Best("loss", mode="min"))
    with ct.open(spec) as ckpt:
        for step, loss in enumerate([0.5, 0.1, float("nan"), 0.3, 0.4, 0.6], start=1):
            ckpt.step(step, params, metrics={"loss": loss})
            ckpt.wait()
            if step == 1:
                ckpt.pin(1)
        assert ckpt.all_steps() == (1, 2, 5, 6)
        assert ckpt.best_step() == 2
        assert ckpt.restore(params, step=ct.best("loss")).step == 2
        with pytest.raises(ct.StepNotFoundError):
            ckpt.pin(3)
        with pytest.raises(ct.StepNotFoundError):
            ckpt.restore(params, step=3)
        with pytest.raises(ct.StepNotFoundError, match="recorded: loss"):
            ckpt.restore(params, step=ct.best("acc", mode="max"))
        with pytest.raises(ct.SpecError, match=r"best\('acc'\) has no mode"):
            ckpt.best_step("acc")


def test_a_step_is_pinned_while_it_is_being_saved(tmp_path):
    with ct.open(spec_for(tmp_path, save=ct.EverySteps(1), keep=ct.Latest(2))) as ckpt:
        for step in ckpt.steps(4):
            ckpt.step(step, {"x": jnp.ones(3)})
            if step == 1:
                ckpt.pin(1)
        assert ckpt.all_steps() == (1, 3, 4)


def test_a_pinned_step_outlives_the_branch_that_needs_its_number(tmp_path):
    state = {"x": jnp.ones(3)}
    spec = spec_for(tmp_path, save=ct.EverySteps(1), keep=ct.Latest(2))
    with ct.open(spec) as ckpt:
        for step in ckpt.steps(3):
            ckpt.step(step, state)
        ckpt.pin(3)
    old = next(listed.branch for listed in ct.ls(tmp_path) if listed.step == 3)
    with ct.open(spec) as ckpt:
        ckpt.restore(state, step=2)
        for step in ckpt.steps(8):
            ckpt.step(step, state)
    assert (3, old, True) in [(listed.step, listed.branch, listed.pinned) for listed in ct.ls(tmp_path)]
