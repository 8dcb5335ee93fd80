# SPDX-License-Identifier: Apache-2.0
"""What is saved, and what is said, when the loop does not come to its end."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import ckpttools as ct
from ckpttools.session.last_step import LastStep

from .runs import spec_for


def make_state():
    return {
        "model": nnx.Linear(2, 2, rngs=nnx.Rngs(0)),
        "host": {"mean": np.zeros(3)},
        "rngs": nnx.Rngs(1),
        "count": {"n": 1},
    }


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda state: None, None),
        (lambda state: state["model"].kernel.set_value(state["model"].kernel + 1), "model.kernel"),
        (lambda state: state["host"]["mean"].__iadd__(1), "host.mean"),
        (lambda state: state["rngs"].default(), "rngs.default.count"),
        (lambda state: state["count"].update(n=2), "count.n"),
        (lambda state: state["count"].update(m=2), "count.m"),
        (lambda state: state["model"].bias[...].delete(), "model.bias"),
    ],
)
def test_any_change_of_the_state_is_found(change, name):
    state, last = make_state(), LastStep()
    last.record(3, state, {})
    change(state)
    assert last.find_changed_leaf() == name


def test_a_device_array_is_not_kept_alive():
    model, last = nnx.Linear(2, 2, rngs=nnx.Rngs(0)), LastStep()
    last.record(1, {"model": model}, {})
    before = len(jax.live_arrays())
    model.kernel.set_value(model.kernel + 1)
    assert len(jax.live_arrays()) == before


def run(directory, *, update=lambda state: None, **options):
    state = {"host": np.zeros(3)}
    with ct.open(spec_for(directory, save=ct.EverySteps(2)), **options) as ckpt:
        for step in ckpt.steps(9):
            state["host"] += 1
            if step == 6:
                update(state)
                raise RuntimeError("the loader failed")
            ckpt.step(step, state)


def leave_early(directory):
    with ct.open(spec_for(directory, save=ct.EverySteps(5))) as ckpt:
        for step in ckpt.steps(9):
            ckpt.step(step, {"w": 1})
            if step == 3:
                break


def test_unsaved_steps_are_named_after_an_exception(tmp_path):
    text = "step 5 is not saved: RuntimeError ended the loop, and the newest saved step is 4"
    with pytest.warns(ct.CheckpointWarning, match=text), pytest.raises(RuntimeError, match="the loader failed"):
        run(tmp_path)
    assert ct.ls(tmp_path)[-1].step == 4


def test_unsaved_steps_are_named_after_a_break(tmp_path):
    with pytest.warns(ct.CheckpointWarning, match="steps 1 to 3 are not saved: the loop ended early, and no step is"):
        leave_early(tmp_path)


def test_a_loop_that_ends_says_nothing(tmp_path):
    with ct.open(spec_for(tmp_path)) as ckpt:
        for step in ckpt.steps(3):
            ckpt.step(step, {"w": 1})
    with ct.open(spec_for(tmp_path / "b")) as ckpt:  # a loop of its own, without a last step
        ckpt.step(1, {"w": 1})


def test_the_last_step_is_saved_if_its_state_is_unchanged(tmp_path):
    values = {"host": np.zeros(3)}
    with pytest.raises(RuntimeError, match="the loader failed"):
        run(tmp_path, update=lambda state: state["host"].__isub__(1), save_on_exception=True)
    assert ct.ls(tmp_path)[-1].step == 5
    assert ct.load(tmp_path, values).state["host"].tolist() == [5, 5, 5]


def test_a_half_updated_state_is_not_saved(tmp_path):
    text = r"step 5 is not saved: .* host has changed since step 5"
    with pytest.warns(ct.CheckpointWarning, match=text), pytest.raises(RuntimeError, match="the loader failed"):
        run(tmp_path, save_on_exception=True)
    assert ct.ls(tmp_path)[-1].step == 4


def test_a_failing_save_hides_no_exception(tmp_path, monkeypatch):
    def fail(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    def fill_the_disk(state):
        state["host"] -= 1
        monkeypatch.setattr("ckpttools.store.orbax.write", fail)

    with pytest.warns(ct.CheckpointWarning, match="No space left"), pytest.raises(RuntimeError, match="the loader"):
        run(tmp_path, update=fill_the_disk, save_on_exception=True)


@pytest.mark.parametrize(("pause", "total"), [(0.0, 12), (0.0, 13), (0.05, 12), (0.05, 13)])
def test_each_durable_step_is_reported_once(tmp_path, pause, total):
    reported = []
    with ct.open(spec_for(tmp_path, save=ct.EverySteps(3), keep=ct.All())) as ckpt:
        for step in ckpt.steps(total):
            if step % 3 and pause:
                ckpt._saver.worker and ckpt._saver.worker.wait(10)
            outcome = ckpt.step(step, {"w": jnp.zeros(3)})
            saved = outcome if isinstance(outcome, ct.Saved) else outcome.finished
            while saved is not None:
                reported.append(saved.step)
                saved = saved.finished
        assert sorted(reported) == list(ckpt.all_steps())
