# SPDX-License-Identifier: Apache-2.0
"""A run with the methods of Orbax's manager."""

import gc
import subprocess
import sys

import jax.numpy as jnp
import orbax.checkpoint as ocp
import pytest
from flax import nnx

import ckpttools as ct


def state(value):
    return {"w": jnp.full(4, float(value))}


def save(manager, *steps):
    for step in steps:
        assert manager.save(step, {"model": state(step)})
    manager.wait_until_finished()


@pytest.fixture
def manager(tmp_path):
    with ct.CheckpointManager(tmp_path) as opened:
        yield opened


def test_orbaxs_arguments_go_in_and_a_composite_comes_out(manager):
    model = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    args = ocp.args.Composite(model=ocp.args.StandardSave(nnx.state(model)), extra=ocp.args.JsonSave({"epoch": 3}))
    assert manager.save(1, args=args)
    assert not manager.save(1, args=args), "it is saved already"
    other = nnx.Linear(2, 2, rngs=nnx.Rngs(1))
    found = manager.restore(1, args=ocp.args.Composite(model=ocp.args.StandardRestore(nnx.state(other))))
    assert isinstance(found, ocp.args.Composite)
    nnx.update(other, found["model"])
    assert (other.kernel[...] == model.kernel[...]).all()
    assert found.model is found["model"]


def test_an_argument_without_a_name(manager):
    manager.save(1, ocp.args.StandardSave(state(1)))
    assert manager.restore(args=ocp.args.StandardRestore(state(0)))["w"][0] == 1


@pytest.mark.filterwarnings("ignore")
def test_plain_orbax_reads_what_was_saved(manager, tmp_path):
    save(manager, 1)
    with ocp.CheckpointManager(tmp_path) as plain:
        args = ocp.args.Composite(model=ocp.args.StandardRestore(state(0)))
        assert plain.restore(1, args=args)["model"]["w"][0] == 1


def test_restoring_asks_for_a_template_and_for_steps(manager):
    with pytest.raises(ct.StepNotFoundError, match="holds no steps"):
        manager.restore(args={"model": state(0)})
    save(manager, 1)
    with pytest.raises(ct.StructureError, match="no template was passed for model"):
        manager.restore(1, args=ocp.args.Composite(model=ocp.args.StandardRestore()))
    with pytest.raises(ct.StructureError, match="no template was passed for default"):
        manager.restore(1)
    with pytest.raises(ct.StepNotFoundError, match="step 7 does not exist"):
        manager.restore(7, args={"model": state(0)})


def test_a_used_directory_asks_for_a_restore(manager, tmp_path):
    save(manager, 1)
    manager.close()
    again = ct.CheckpointManager(tmp_path)
    with pytest.raises(ct.NotRestoredError, match=r"load_checkpoint\(checkpoint_manager, model\)"):
        again.save(2, {"model": state(2)})
    again.load({"model": state(0)})
    save(again, 2)
    assert again.all_steps() == [1, 2]


def test_restoring_an_old_step_is_not_a_rollback(manager):
    save(manager, 1, 2, 3)
    manager.restore(1, args={"model": state(0)})
    save(manager, 4)
    assert manager.all_steps() == [1, 2, 3, 4]


def test_a_save_below_the_newest_step_begins_a_branch(manager):
    save(manager, 1, 2, 3)
    manager.restore(1, args={"model": state(0)})
    save(manager, 2)
    assert manager.all_steps() == [1, 2]
    assert manager.latest_step() == 2


def test_delete_takes_any_but_the_newest(manager):
    save(manager, 1, 2, 3)
    manager.delete(1)
    assert manager.all_steps() == [2, 3]
    assert not (manager.directory / "1").exists()
    with pytest.raises(ct.StepNotFoundError, match="step 1 cannot be deleted"):
        manager.delete(1)
    with pytest.raises(ct.StepOrderError, match="step 3 is the newest"):
        manager.delete(3)
    manager.pin(2)
    assert ct.verify(manager.directory).ok


def test_delete_without_the_lock_takes_it_for_a_moment(manager, tmp_path):
    save(manager, 1, 2)
    manager.close()
    with ct.CheckpointManager(tmp_path) as first, ct.CheckpointManager(tmp_path) as second:
        first.delete(1)
        assert second.all_steps() == [2]
        second.load({"model": state(0)})
        second.save(3, {"model": state(3)})
        with pytest.raises(ct.RunInUseError):
            first.delete(2)
        second.wait_until_finished()
        assert second.all_steps() == [2, 3]


def test_a_failed_save_is_reported_and_raised(manager, monkeypatch):
    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    assert manager.check_for_errors() is None
    monkeypatch.setattr("ckpttools.store.orbax.write", full)
    manager.save(1, {"model": state(1)})
    manager.session._saver.worker.wait(60)
    for _ in range(2):
        assert isinstance(manager.check_for_errors(), ct.DiskSpaceError)
    with pytest.raises(ct.DiskSpaceError):
        manager.wait_until_finished()
    assert manager.check_for_errors() is None
    assert manager.latest_step() is None


def test_step_zero_is_the_state_before_the_first_update(manager):
    save(manager, 0, 1)
    assert manager.restore(0, args={"model": state(9)}).model["w"][0] == 0
    with pytest.raises(ct.StepOrderError):
        manager.save(-1, {"model": state(0)})
    with pytest.raises(ct.StepOrderError):
        manager.session.step(0, {"model": state(0)})


def test_metrics_are_kept(manager):
    manager.save(1, {"model": state(1)}, metrics={"loss": 0.5})
    manager.wait_until_finished()
    assert ct.ls(manager.directory)[0].metrics == {"loss": 0.5}


def test_the_run_is_closed_with_the_manager(tmp_path):
    manager = ct.CheckpointManager(tmp_path)
    manager.save(1, {"model": state(1)})
    del manager
    gc.collect()
    with ct.CheckpointManager(tmp_path) as again:
        again.load({"model": state(0)})
        save(again, 2)


def test_a_script_that_ends_without_a_wait_is_warned(tmp_path):
    """Python makes no thread at its end, and Orbax needs some."""
    code = f"""
import jax.numpy as jnp, ckpttools as ct
manager = ct.CheckpointManager({str(tmp_path)!r})
manager.save(1, {{"model": {{"w": jnp.ones(4)}}}})
manager.wait_until_finished()
manager.save(2, {{"model": {{"w": jnp.ones(4)}}}})
"""
    ended = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    with ct.CheckpointManager(tmp_path) as manager:
        # How far the second save gets before is a matter of luck.
        told = "step 2 was not saved" in ended.stderr and "wait() or close()" in ended.stderr
        assert manager.all_steps() == ([1] if told else [1, 2])
    assert ct.verify(tmp_path).ok


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"max_to_keep": 3}, [2, 3, 4]),
        ({"max_to_keep": None, "enable_async_checkpointing": False}, [1, 2, 3, 4]),
        # One step would be the end of the run if it is damaged.
        ({"max_to_keep": 1}, [3, 4]),
    ],
)
def test_orbaxs_options_say_what_is_kept(tmp_path, options, kept):
    with ct.CheckpointManager(tmp_path, options=ocp.CheckpointManagerOptions(**options)) as manager:
        save(manager, 1, 2, 3, 4)
        assert manager.all_steps() == kept
        assert manager.session.spec.storage.asynchronous is options.get("enable_async_checkpointing", True)


def test_options_that_are_not_taken_raise(tmp_path):
    with pytest.raises(ct.SpecError, match="the options set keep_period, save_interval_steps"):
        ct.CheckpointManager(tmp_path, ocp.CheckpointManagerOptions(save_interval_steps=5, keep_period=10))
    with pytest.raises(ct.SpecError, match="is not a CheckpointManagerOptions"):
        ct.CheckpointManager(tmp_path, {"max_to_keep": 3})
    with pytest.raises(ct.SpecError, match="is not a directory"):
        ct.CheckpointManager(tmp_path / "none", ocp.CheckpointManagerOptions(create=False))
    with pytest.raises(ct.SpecError, match="both passed"):
        ct.CheckpointManager(ct.CheckpointSpec(directory=tmp_path), ocp.CheckpointManagerOptions())
