# SPDX-License-Identifier: Apache-2.0
"""Restoring: what is filled, and from which step the run continues."""

import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import ckpttools as ct
from ckpttools.restore import first_intact
from ckpttools.store import layout
from ckpttools.store.lock import WriterLock
from tests.ckpttools.behaviour.examples import Net, leaves, make_state

from .runs import spec_for, train


def test_a_functional_loop_restores_the_same_bits(tmp_path):
    state, _ = train(spec_for(tmp_path), 2)
    fresh = make_state(7)
    graphdef, split = nnx.split(fresh["model"])
    before = leaves({"model": split})
    with ct.open(spec_for(tmp_path)) as ckpt:
        report = ckpt.restore({"model": split})
    assert leaves(report.state) == leaves({"model": state["model"]})
    assert leaves({"model": split}) == before, "the state passed in must stay as it was"
    assert isinstance(nnx.merge(graphdef, report.state["model"]), Net)


def test_an_abstract_template_is_filled(tmp_path):
    state, _ = train(spec_for(tmp_path), 2)
    abstract = nnx.eval_shape(lambda: Net(nnx.Rngs(0)))
    with ct.open(spec_for(tmp_path)) as ckpt:
        ckpt.restore({"model": abstract})
    assert leaves({"model": abstract}) == leaves({"model": state["model"]})


def test_an_empty_directory_restores_nothing_and_says_so(tmp_path):
    state = make_state()
    before = leaves(state)
    with ct.open(spec_for(tmp_path)) as ckpt:
        report = ckpt.restore(state)
        assert next(ckpt.steps(2)) == 1
    assert report.step is None
    assert str(report) == "nothing to restore"
    assert leaves(state) == before


@pytest.mark.parametrize("step", [np.int64(1), jnp.int32(1), True, "1", "lates", None, 1.0], ids=repr)
def test_an_invalid_selector_does_not_restore_the_latest_step(tmp_path, step):
    state = {"w": np.arange(3.0)}
    with ct.open(spec_for(tmp_path)) as ckpt:
        ckpt.save(1, state)
        ckpt.save(2, state)
        ckpt.wait()
        with pytest.raises(ct.SpecError, match="does not select a step"):
            ckpt.restore(state, step=step)


STATE = {"w": np.arange(3.0)}


@pytest.fixture
def saved(tmp_path):
    """A run of three steps, and a copy of it."""
    with ct.open(ct.CheckpointSpec(directory=tmp_path / "run", keep=ct.All())) as ckpt:
        for step in (10, 20, 30):
            ckpt.save(step, STATE)
    shutil.copytree(tmp_path / "run", tmp_path / "intact")
    return tmp_path / "run"


def damage_manifest(step):
    (step / layout.MANIFEST).write_bytes(b"{}")


def put_intact(run, step):
    shutil.rmtree(run / str(step))
    shutil.copytree(run.with_name("intact") / str(step), run / str(step))
    (run / str(step)).touch()  # As a save or a fetch does; `copytree` copies the times.


def states(run):
    return {row.step: row.state for row in ct.ls(run)}


def test_a_step_that_is_intact_again_is_not_superseded(saved):
    spec = ct.CheckpointSpec(directory=saved, keep=ct.All())
    damage_manifest(saved / "30")
    with ct.open(spec) as ckpt:
        with WriterLock(saved).hold():  # A writer that is alive: the reader may not move the step.
            assert ckpt.restore(STATE).step == 20
        put_intact(saved, 30)
        with pytest.raises(ct.NotRestoredError, match="passed over step 30 of") as caught:
            ckpt.step(21, STATE)
        assert "would supersede it" in caught.value.why
        with pytest.raises(ct.NotRestoredError):
            ckpt.save(21, STATE)
        assert states(saved) == {10: "committed", 20: "committed", 30: "committed"}
        assert ckpt.restore(STATE).step == 30
        ckpt.save(31, STATE)
    assert states(saved)[30] == "committed"


@pytest.mark.parametrize("step", ["latest", 20], ids=["passed over", "requested"])
def test_a_rollback_that_was_decided_goes_on(saved, step):
    """Control."""
    if step == "latest":
        damage_manifest(saved / "30")
    with ct.open(ct.CheckpointSpec(directory=saved, keep=ct.All())) as ckpt:
        assert ckpt.restore(STATE, step=step).step == 20
        ckpt.save(21, STATE)
    assert states(saved) == {10: "committed", 20: "committed", 21: "committed"} | (
        {} if step == "latest" else {30: "superseded"}
    )


def test_a_step_that_is_replaced_while_it_is_read_is_tried_again(saved, monkeypatch):
    read, tried = first_intact.read_step, []

    def replace_and_read(entry, *args):
        tried.append(entry.step)
        if tried == [30]:
            damage_manifest(saved / "30")
            put_intact(saved, 30)
            raise ct.IncompleteStepError(what="a file of step 30 is missing.")
        return read(entry, *args)

    monkeypatch.setattr(first_intact, "read_step", replace_and_read)
    with ct.open(ct.CheckpointSpec(directory=saved, keep=ct.All())) as ckpt:
        assert ckpt.restore(STATE).step == 30
    assert tried == [30, 20, 30]
