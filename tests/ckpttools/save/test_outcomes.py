# SPDX-License-Identifier: Apache-2.0
"""The outcome of a call says what happened, as one of four frozen values."""

import dataclasses

import jax.numpy as jnp
import pytest

import ckpttools as ct

STATE = {"params": jnp.ones(2)}


def name_outcome(outcome):
    match outcome:
        case ct.Saved(step=step):
            return f"saved {step}"
        case ct.Started(step=step):
            return f"started {step}"
        case ct.Skipped(step=step):
            return f"skipped {step}"
        case ct.Failed(step=step, error=error):
            return f"failed {step}: {type(error).__name__}"


def test_each_outcome_can_be_matched(tmp_path):
    spec = ct.CheckpointSpec(directory=tmp_path, save=ct.EverySteps(2))
    with ct.open(spec) as ckpt:
        steps = ckpt.steps(3)
        names = [name_outcome(ckpt.step(step, STATE)) for step in steps]
        names.append(name_outcome(ckpt.save(2, STATE, on_error="return")))
    assert names == ["skipped 1", "started 2", "saved 3", "failed 2: StepOrderError"]


def test_an_outcome_is_frozen():
    outcome = ct.Skipped(step=1, reason="not due")
    with pytest.raises(dataclasses.FrozenInstanceError):
        outcome.step = 2
