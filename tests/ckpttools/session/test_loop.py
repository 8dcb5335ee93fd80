# SPDX-License-Identifier: Apache-2.0
"""Which steps are saved, and which loops may continue a run."""

import pathlib

import jax.numpy as jnp
import pytest

import ckpttools as ct
from tests.ckpttools.behaviour.examples import make_state

from .runs import spec_for, train


def test_outcomes_say_what_happened_and_why(tmp_path):
    _, outcomes = train(spec_for(tmp_path), 5)
    kinds = [type(outcome).__name__ for outcome in outcomes]
    assert kinds == ["Skipped", "Started", "Skipped", "Started", "Saved"]
    assert outcomes[0].reason == "not due: every 2 steps"
    assert outcomes[3].finished.step == 2 or outcomes[2].finished.step == 2
    assert outcomes[4].reason == "the final step"
    assert outcomes[4].path == tmp_path / "5"


def test_training_in_a_used_directory_without_restore_is_refused(tmp_path):
    train(spec_for(tmp_path), 2)
    with ct.open(spec_for(tmp_path)) as ckpt:
        with pytest.raises(ct.NotRestoredError, match="restore"):
            ckpt.steps(4)
        with pytest.raises(ct.NotRestoredError):
            ckpt.save(3, make_state())
        assert ckpt.all_steps() == (2,)


def test_a_run_on_a_read_only_disk_is_only_restored(tmp_path, monkeypatch):
    params = {"params": jnp.ones(2)}
    with ct.open(spec_for(tmp_path)) as ckpt:
        ckpt.save(1, params)

    def refuse(*_args, **_kwargs):
        raise PermissionError(30, "Read-only file system")

    monkeypatch.setattr(pathlib.Path, "write_bytes", refuse)
    with ct.open(spec_for(tmp_path)) as ckpt:
        assert ckpt.restore(params).step == 1
        with pytest.raises(ct.StorageError, match="cannot be written"):
            ckpt.steps(4)


def test_the_final_step_without_a_call_to_step_warns(tmp_path):
    with ct.open(spec_for(tmp_path)) as ckpt, pytest.warns(ct.CheckpointWarning, match="final step 2"):
        list(ckpt.steps(2))


def test_another_spec_continues_a_run(tmp_path):
    train(spec_for(tmp_path, save=ct.EverySeconds(1000) | ct.EverySteps(2)), 2)
    _, outcomes = train(spec_for(tmp_path, save=ct.OnImprovement("loss", mode="max")), 4)
    assert isinstance(outcomes[0], ct.Started), "the seconds of the one are not the best loss of the other"


def test_a_closed_session_saves_nothing(tmp_path):
    with ct.open(spec_for(tmp_path)) as ckpt:
        ckpt.save(1, {"x": jnp.ones(3)})
    with pytest.raises(ct.StepOrderError, match="is closed"):
        ckpt.save(2, {"x": jnp.ones(3)})
