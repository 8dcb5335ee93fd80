# SPDX-License-Identifier: Apache-2.0
"""A spec as Orbax's options: Orbax's manager then saves and keeps what a session would, or the translation raises."""

import warnings

import jax.numpy as jnp
import orbax.checkpoint as ocp
import pytest

import ckpttools as ct
from ckpttools.spec.retention import Retention, Union
from ckpttools.spec.triggers import Trigger

STATE = {"w": jnp.ones(4)}
NAN = float("nan")
LOSSES = [0.5, 0.2, NAN, 0.4, 0.2, 0.9, 0.8]


def spec_of(directory="run", **fields):
    return ct.CheckpointSpec(directory=directory, **fields)


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def plain_run(spec, losses):
    with ocp.CheckpointManager(spec.directory / "plain", options=ct.orbax_options(spec)) as manager:
        for step, loss in enumerate(losses, start=1):
            if manager.should_save(step):
                manager.save(step, args=ocp.args.StandardSave(STATE), metrics={"loss": loss})
                manager.wait_until_finished()
        return list(manager.all_steps()), manager.best_step()


def our_run(spec, losses):
    with ct.open(spec_of(spec.directory / "ours", save=spec.save, keep=spec.keep)) as ckpt:
        for step, loss in enumerate(losses, start=1):
            ckpt.step(step, {"model": STATE}, metrics={"loss": loss})
            ckpt.wait()
        named = spec.get_metric_modes()
        return list(ckpt.all_steps()), ckpt.best_step() if named else None


SPECS = {
    "latest": {"save": ct.EverySteps(1), "keep": ct.Latest(3)},
    "one is two": {"save": ct.EverySteps(1), "keep": ct.Latest(1)},
    "steps": {"save": ct.EverySteps(3) | ct.AtSteps((1, 2)), "keep": ct.All()},
    "best min": {"save": ct.EverySteps(1), "keep": ct.Best("loss", mode="min", n=2)},
    "best max": {"save": ct.EverySteps(1), "keep": ct.Best("loss", mode="max")},
    "trail": {"save": ct.EverySteps(1), "keep": ct.EveryNSteps(3) | ct.Pinned((1,)) | ct.Latest(2)},
}


@pytest.mark.parametrize("fields", SPECS.values(), ids=SPECS.keys())
def test_orbax_saves_and_keeps_what_a_session_does(tmp_path, fields):
    spec = spec_of(tmp_path, **fields)
    plain, ours = plain_run(spec, LOSSES), our_run(spec, LOSSES)
    assert plain[0] == ours[0]
    if spec.get_metric_modes():
        assert plain[1] == ours[1]


def test_metrics_reach_the_disk(tmp_path):
    """Control: with the policy alone and no best_fn, Orbax forgets them (defect a)."""
    spec = spec_of(tmp_path, save=ct.EverySteps(1), keep=ct.Best("loss", mode="min", n=2))
    plain_run(spec, [0.5, 0.1, 0.3, 0.4])
    with ocp.CheckpointManager(tmp_path / "plain", options=ct.orbax_options(spec)) as manager:
        assert manager.best_step() == 2


def test_time_and_background_are_passed_on():
    options = ct.orbax_options(
        spec_of(save=ct.EverySeconds(90), keep=ct.EveryNSeconds(60), storage=ct.Storage(timeout_s=12.5))
    )
    first, last = options.save_decision_policy.policies
    assert first.minimum_interval_secs == 90
    assert type(last).__name__ == "PreemptionCheckpointingPolicy"
    assert options.preservation_policy.policies[0].interval_secs == 60
    assert options.async_options.timeout_secs == 13
    assert options.enable_async_checkpointing
    assert not ct.orbax_options(spec_of(storage=ct.Storage(asynchronous=False))).enable_async_checkpointing


class OwnTrigger(Trigger):
    pass


class OwnRetention(Retention):
    pass


REFUSED = {
    "improvement": ({"save": ct.OnImprovement("loss", mode="min")}, "before it gets the metrics"),
    "adaptive": ({"save": ct.EverySteps(5) | ct.Adaptive("loss")}, "before it gets the metrics"),
    "and": ({"save": ct.EverySteps(5) & ct.EverySeconds(9)}, "by 'or' only"),
    "own trigger": ({"save": OwnTrigger()}, "no policy like it"),
    "own retention": ({"keep": Union(OwnRetention())}, "no policy like it"),
    "mirror": ({"mirror": "memory://run"}, "one place"),
    "version": ({"state_version": 2}, "neither records a version"),
    "readback": ({"integrity": ct.Integrity(verify="readback")}, "does not read back"),
    "sha256": ({"integrity": ct.Integrity(digest="sha256")}, "writes no digests"),
    "free space": ({"storage": ct.Storage(min_free=10)}, "free space"),
    "prune": ({"storage": ct.Storage(when_full="prune")}, "free space"),
}


@pytest.mark.parametrize(("fields", "reason"), REFUSED.values(), ids=REFUSED.keys())
def test_what_orbax_cannot_express_raises_with_the_reason(fields, reason):
    with pytest.raises(ct.SpecError, match=reason) as caught:
        ct.orbax_options(spec_of(**fields))
    assert caught.value.fix
