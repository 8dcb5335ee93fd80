# SPDX-License-Identifier: Apache-2.0
"""Advice is given once, for a reason, with the value to use."""

import jax.numpy as jnp
import pytest

import ckpttools as ct
from ckpttools.session.advice import MetricWatch, StallMeter, advise_on_retention
from tests.ckpttools.restore.test_first_intact import STATE, flip_bit, largest_file


def advice(*, stall_s, every_s, saves=6, steps_each=10):
    meter = StallMeter()
    texts = [meter.add(now_s=n * every_s, step=n * steps_each, stall_s=stall_s) for n in range(saves)]
    return [text for text in texts if text]


def test_saving_too_often_advises_once_which_interval_costs_one_percent():
    (text,) = advice(stall_s=2.0, every_s=20.0)
    assert "10% of the training time (2 s for each save)" in text
    # 2 s are 1 % of 200 s, which are 112 steps of 1.8 s.
    assert "EverySteps(112) or EverySeconds(200) would cost 1%" in text


def test_no_advice_without_a_reason():
    assert advice(stall_s=2.0, every_s=60.0) == [], "3 % are fine"
    assert advice(stall_s=0.1, every_s=0.5) == [], "half a second in total is not worth advice"
    assert advice(stall_s=2.0, every_s=20.0, saves=3) == [], "two intervals prove nothing"


def test_the_session_warns(tmp_path, monkeypatch):
    monkeypatch.setattr("ckpttools.session.advice._MIN_STALL_S", 0.0)
    monkeypatch.setattr("ckpttools.session.advice.MAX_STALL_FRACTION", 0.0)
    spec = ct.CheckpointSpec(directory=tmp_path, save=ct.EverySteps(1), storage=ct.Storage(asynchronous=False))
    with ct.open(spec) as ckpt:
        for step in range(1, 4):
            ckpt.step(step, {"w": jnp.ones(2)})
        with pytest.warns(ct.CheckpointWarning, match="of the training time"):
            ckpt.step(4, {"w": jnp.ones(2)})


def test_few_steps_left_after_damage_warns(tmp_path):
    spec = ct.CheckpointSpec(directory=tmp_path, keep=ct.Latest(2))
    with ct.open(spec) as ckpt:
        for step in (1, 2):
            ckpt.save(step, STATE)
    flip_bit(largest_file(tmp_path / "2"))
    with ct.open(spec) as ckpt, pytest.warns(ct.CheckpointWarning, match=r"keep=Latest\(4\)"):
        assert ckpt.restore(STATE).step == 1
    assert advise_on_retention(rejected_count=0, intact_count=1) is None
    assert advise_on_retention(rejected_count=1, intact_count=2) is None


def watched(steps, *, last=False):
    watch = MetricWatch({"val_loss"})
    texts = [watch.add(names, is_last=last and number == len(steps)) for number, names in enumerate(steps, start=1)]
    return [text for text in texts if text]


def test_a_metric_that_is_never_passed_is_noticed_once():
    (text,) = watched([["loss"]] * 2500, last=True)
    assert "'val_loss', which none of 1000 steps had; they had 'loss'" in text
    (text,) = watched([[]] * 20, last=True)
    assert "they had no metrics" in text


def test_a_late_metric_or_a_short_run_gives_no_advice():
    assert watched([["loss"]] * 999 + [["loss", "val_loss"]] * 2, last=True) == []
    assert watched([["loss"]] * 9, last=True) == []
    assert watched([["loss"]] * 20) == []


def test_a_run_whose_spec_misspells_a_metric_warns(tmp_path):
    spec = ct.CheckpointSpec(directory=tmp_path, save=ct.OnImprovement("val_loss", mode="min"))
    with ct.open(spec) as ckpt:
        steps = ckpt.steps(12)
        for step in range(1, 12):
            assert next(steps) == step
            ckpt.step(step, STATE, metrics={"loss": 1.0 / step})
        with pytest.warns(ct.CheckpointWarning, match="'val_loss', which none of 12 steps had"):
            ckpt.step(next(steps), STATE, metrics={"loss": 0.0})
