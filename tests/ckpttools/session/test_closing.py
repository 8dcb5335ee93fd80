# SPDX-License-Identifier: Apache-2.0
"""However a session ends, the save in progress is waited for, its error is reported, and the lock is released."""

import numpy as np
import pytest

import ckpttools as ct
from ckpttools.store import orbax
from ckpttools.store.lock import WriterLock

STATE = {"w": np.arange(4.0)}


def fail(*_args, **_options):
    raise OSError(5, "Input/output error")


def is_free(directory):
    lock = WriterLock(directory)
    lock.acquire()
    lock.release()
    return True


def test_the_lock_is_held_until_the_session_is_closed(tmp_path):
    spec = ct.CheckpointSpec(directory=tmp_path)
    with ct.open(spec) as ckpt:
        ckpt.save(1, STATE)
        with pytest.raises(ct.RunInUseError):
            is_free(tmp_path)
    assert is_free(tmp_path)
    ckpt.close()
    assert [row.step for row in ct.ls(tmp_path)] == [1]


def test_the_error_of_a_save_in_progress_is_raised_at_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr(orbax, "write", fail)
    with pytest.raises(ct.StorageError, match="Input/output"), ct.open(ct.CheckpointSpec(directory=tmp_path)) as ckpt:
        ckpt.save(1, STATE)
    assert is_free(tmp_path)


def train(spec, *, step, state, change=0.0, **options):
    """Pass one step, and raise an error of the program."""
    with ct.open(spec, **options) as ckpt:
        ckpt.step(step, state)
        state["w"] += change
        raise ZeroDivisionError


def test_the_error_of_a_save_does_not_hide_another_error(tmp_path, monkeypatch):
    monkeypatch.setattr(orbax, "write", fail)
    spec = ct.CheckpointSpec(directory=tmp_path, save=ct.EverySteps(1))
    with (
        pytest.warns(ct.CheckpointWarning, match="the save in progress failed"),
        pytest.warns(ct.CheckpointWarning, match="step 1 is not saved: ZeroDivisionError"),
        pytest.raises(ZeroDivisionError),
    ):
        train(spec, step=1, state={"w": np.arange(4.0)})
    assert is_free(tmp_path)


def test_the_last_step_is_saved_after_an_exception(tmp_path):
    spec = ct.CheckpointSpec(directory=tmp_path, save=ct.EverySteps(100))
    with pytest.raises(ZeroDivisionError):
        train(spec, step=3, state={"w": np.arange(4.0)}, save_on_exception=True)
    ct.open(spec).close()
    assert [(row.step, row.reason) for row in ct.ls(tmp_path)] == [(3, "ZeroDivisionError ended the loop")]


def test_a_state_that_has_changed_since_is_not_saved(tmp_path):
    """Control."""
    spec = ct.CheckpointSpec(directory=tmp_path, save=ct.EverySteps(100))
    with pytest.warns(ct.CheckpointWarning, match="w has changed since step 3"), pytest.raises(ZeroDivisionError):
        train(spec, step=3, state={"w": np.arange(4.0)}, change=1.0, save_on_exception=True)
    assert list(ct.ls(tmp_path)) == []
