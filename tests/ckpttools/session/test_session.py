# SPDX-License-Identifier: Apache-2.0
"""A run from open to close: resumed bit for bit."""

import jax.numpy as jnp
import pytest

import ckpttools as ct
from tests.ckpttools.behaviour.examples import leaves

from .runs import spec_for, train


@pytest.mark.parametrize("asynchronous", [True, False], ids=["background", "blocking"])
def test_a_resumed_run_ends_with_the_same_bits(tmp_path, asynchronous):
    storage = ct.Storage(asynchronous=asynchronous)
    whole, _ = train(spec_for(tmp_path / "whole", storage=storage), 6)
    train(spec_for(tmp_path / "cut", storage=storage), 3)
    # Another seed: whatever is not restored would show.
    resumed, outcomes = train(spec_for(tmp_path / "cut", storage=storage), 6, seed=7)
    assert [outcome.step for outcome in outcomes] == [4, 5, 6]
    assert leaves(resumed) == leaves(whole)


def test_without_restore_the_bits_differ(tmp_path):
    """The control of the test above."""
    whole, _ = train(spec_for(tmp_path / "whole"), 6)
    other, _ = train(spec_for(tmp_path / "other"), 6, seed=7)
    assert leaves(other) != leaves(whole)


def test_save_now_saves_the_step_that_was_last_passed(tmp_path):
    spec = ct.CheckpointSpec(directory=tmp_path, save=ct.EverySteps(100))
    with ct.open(spec) as ckpt:
        with pytest.raises(ct.StepOrderError, match="before the first step"):
            ckpt.save_now({"w": jnp.ones(2)}, reason="x")
        ckpt.step(7, {"w": jnp.ones(2)})
        ckpt.save_now({"w": jnp.ones(2)}, reason="before evaluation")
        assert ckpt.wait().reason == "before evaluation"
        assert ckpt.latest_step() == 7
