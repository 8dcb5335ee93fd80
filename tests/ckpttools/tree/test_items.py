# SPDX-License-Identifier: Apache-2.0
"""Items and metrics by name."""

import jax.numpy as jnp
import numpy as np
import pytest

import ckpttools as ct


def _deleted():
    array = jnp.ones(())
    array.delete()
    return array


@pytest.mark.parametrize(
    ("make", "message"),
    [
        pytest.param(lambda: [1], "the metrics are", id="list"),
        pytest.param(lambda: {1: 2.0}, "the metrics are", id="nameless"),
        pytest.param(lambda: {"loss": 10**400}, "'loss' is 1000", id="huge"),
        pytest.param(lambda: {"loss": _deleted()}, "'loss' is a deleted array", id="deleted"),
    ],
)
def test_metrics_that_cannot_be_compared_are_refused_by_name(tmp_path, make, message):
    with ct.open(ct.CheckpointSpec(directory=tmp_path)) as ckpt, pytest.raises(ct.LeafError, match=message):
        ckpt.save(1, {"w": np.ones(2)}, metrics=make())


def test_a_metric_that_is_not_a_number_is_refused(tmp_path):
    with ct.open(ct.CheckpointSpec(directory=tmp_path)) as ckpt, pytest.raises(ct.LeafError, match="metric 'loss'"):
        ckpt.save(1, {"params": jnp.ones(1)}, metrics={"loss": "low"})


@pytest.mark.parametrize("name", ["", "x" * 201])
def test_a_metric_name_that_record_refuses_is_refused_at_a_save(tmp_path, name):
    with ct.open(ct.CheckpointSpec(directory=tmp_path)) as ckpt, pytest.raises(ct.LeafError, match="characters"):
        ckpt.save(1, {"w": 1}, {name: 0.5})
    assert ct.ls(tmp_path) == ()


@pytest.mark.parametrize("value", ["0.5", None, [0.5], 1j])
def test_a_metric_that_is_not_a_number_is_refused_though_no_save_is_due(tmp_path, value):
    with ct.open(ct.CheckpointSpec(directory=tmp_path, save=ct.EverySteps(9))) as ckpt:
        with pytest.raises(ct.LeafError, match="the metric 'loss' is"):
            ckpt.step(1, {"w": 1}, {"loss": value})
        assert isinstance(ckpt.step(1, {"w": 1}, {"loss": 0.5}), ct.Skipped)
