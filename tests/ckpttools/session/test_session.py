# SPDX-License-Identifier: Apache-2.0
"""A run from open to close: resume bit for bit, outcomes, what is refused."""

import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import ckpttools as ct
from ckpttools.store import orbax
from ckpttools.tree import snapshot
from tests.ckpttools.behaviour.examples import Net, leaves, make_state, train_step


def spec_for(folder, **changes):
    fields = {"save": ct.EverySteps(2), "keep": ct.Latest(3), **changes}
    return ct.CheckpointSpec(directory=folder, **fields)


def train(spec, total, *, seed=0):
    """Train to `total` in a fresh process's stead; returns the state and the outcomes."""
    state, outcomes = make_state(seed), []
    with ct.open(spec) as ckpt:
        ckpt.restore(state)
        for step in ckpt.steps(total):
            loss = train_step(state)
            outcomes.append(ckpt.step(step, state, metrics={"loss": loss}))
    return state, outcomes


@pytest.mark.parametrize("asynchronous", [True, False], ids=["background", "blocking"])
def test_a_resumed_run_ends_with_the_bits_of_an_uninterrupted_one(tmp_path, asynchronous):
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


def test_outcomes_say_what_happened_and_why(tmp_path):
    _, outcomes = train(spec_for(tmp_path), 5)
    kinds = [type(outcome).__name__ for outcome in outcomes]
    assert kinds == ["Skipped", "Started", "Skipped", "Started", "Saved"]
    assert outcomes[0].reason == "not due: every 2 steps"
    assert outcomes[3].finished.step == 2 or outcomes[2].finished.step == 2
    assert outcomes[4].reason == "the final step"
    assert outcomes[4].path == tmp_path / "5"


def test_an_empty_directory_restores_nothing_and_says_so(tmp_path):
    state = make_state()
    before = leaves(state)
    with ct.open(spec_for(tmp_path)) as ckpt:
        report = ckpt.restore(state)
        assert next(ckpt.steps(2)) == 1
    assert report.step is None
    assert str(report) == "nothing to restore"
    assert leaves(state) == before


def test_a_path_is_no_spec(tmp_path):
    with pytest.raises(ct.SpecError, match="by a CheckpointSpec") as caught:
        ct.open(str(tmp_path))
    assert "CheckpointSpec(directory=" in caught.value.fix


def test_training_on_in_a_used_directory_without_restore_is_refused(tmp_path):
    train(spec_for(tmp_path), 2)
    with ct.open(spec_for(tmp_path)) as ckpt:
        with pytest.raises(ct.NotRestoredError, match="restore"):
            ckpt.steps(4)
        with pytest.raises(ct.NotRestoredError):
            ckpt.save(3, make_state())
        assert ckpt.all_steps() == (2,)


def test_a_template_of_another_shape_lists_the_leaves_and_changes_nothing(tmp_path):
    train(spec_for(tmp_path), 2)
    other = {"model": Net(nnx.Rngs(0), width=4)}
    before = leaves(other)
    with ct.open(spec_for(tmp_path)) as ckpt, pytest.raises(ct.StructureError) as caught:
        ckpt.restore(other)
    assert "model.layers.0.kernel: float32[8,8] on disk, float32[4,4] here" in caught.value.mismatches
    assert leaves(other) == before
    assert (tmp_path / "2" / "ckpttools.manifest").exists()


def test_another_dtype_is_a_mismatch_and_not_a_cast(tmp_path):
    spec = spec_for(tmp_path)
    with ct.open(spec) as ckpt:
        ckpt.save(1, {"params": {"w": jnp.full(3, 0.7)}})
    with ct.open(spec) as ckpt, pytest.raises(ct.StructureError, match=r"params.w: float32\[3\] on disk, int32\[3\]"):
        ckpt.restore({"params": {"w": jnp.zeros(3, jnp.int32)}})


def test_a_missing_item_names_those_that_are_there(tmp_path):
    train(spec_for(tmp_path), 2)
    with ct.open(spec_for(tmp_path)) as ckpt, pytest.raises(ct.StructureError, match="the step has model, optimizer"):
        ckpt.restore({"modle": make_state()["model"]})


def test_every_kind_of_leaf_comes_back(tmp_path):
    values = {
        "typed_key": jax.random.key(3),
        "keys": jax.random.split(jax.random.key(1, impl="rbg"), 3),
        "bf16": jnp.arange(3, dtype=jnp.bfloat16),
        "f8": jnp.ones(3, jnp.float8_e4m3fn),
        "i4": jnp.ones(4, jnp.int4),
        "empty": jnp.zeros((0, 3)),
        "scalar": jnp.float32(2.5),
        "weak": jnp.asarray(2.5),
        "numpy": np.arange(4.0),
        "numpy_scalar": np.float64(0.1),
        "flag": True,
        "int": 2**70,
        "float": 0.1,
        "nan": float("nan"),
        "complex": 1 + 2j,
        "text": "naïve\n",
        "bytes": b"\x00\xff",
        "none": None,
        "by_int": {0: jnp.ones(2), 10: jnp.zeros(2)},
        "pair": (jnp.ones(1), [jnp.zeros(1)]),
    }
    spec = spec_for(tmp_path)
    with ct.open(spec) as ckpt:
        ckpt.save(1, {"misc": values})
    blank = jax.tree.map(lambda x: x, values)
    with ct.open(spec) as ckpt:
        restored = ckpt.restore({"misc": blank}).state["misc"]
    nan, restored_nan = values.pop("nan"), restored.pop("nan")
    assert np.isnan(nan)
    assert np.isnan(restored_nan)
    assert leaves({"misc": restored}) == leaves({"misc": values})
    assert jax.tree.structure(restored) == jax.tree.structure(values)
    assert restored["weak"].weak_type
    assert type(restored["numpy_scalar"]) is np.float64


def test_names_that_orbax_would_merge_are_refused(tmp_path):
    with ct.open(spec_for(tmp_path)) as ckpt, pytest.raises(ct.StructureError, match=r"share the name 'a\.b'"):
        ckpt.save(1, {"params": {"a.b": jnp.ones(1), "a": {"b": jnp.zeros(1)}}})


@pytest.mark.parametrize(
    ("state", "message"),
    [
        pytest.param(3, "the state is a int", id="no mapping"),
        pytest.param({"../x": 1}, "named '../x'", id="a name that is a path"),
        pytest.param({"metrics": 1}, "named 'metrics'", id="a reserved name"),
        pytest.param({"misc": {"f": object()}}, "misc.f is a builtins.object", id="an object"),
        pytest.param({"misc": np.array([{}])}, "dtype object", id="an object array"),
        pytest.param({"misc": np.ma.array([1, 2], mask=[0, 1])}, "misc is a masked array", id="a masked array"),
        pytest.param({"misc": {"0": 1, 0: 2}}, "cannot be flattened", id="keys without an order"),
        pytest.param({"misc": {"\ud800": np.ones(1)}}, "has a key", id="half a character"),
        pytest.param({"misc": {"f": jax.ShapeDtypeStruct((2,), jnp.float32)}}, "misc.f is abstract", id="abstract"),
    ],
)
def test_a_state_that_cannot_be_stored_is_refused_before_anything_is_written(tmp_path, state, message):
    with ct.open(spec_for(tmp_path)) as ckpt, pytest.raises(ct.LeafError, match=message):
        ckpt.save(1, state)
    assert not list(tmp_path.glob("[0-9]*"))


@pytest.mark.parametrize("make", [lambda: jnp.ones(3), lambda: jax.random.key(0)])
def test_an_array_that_was_donated_is_named(tmp_path, make):
    donated = make()
    donated.delete()
    with ct.open(spec_for(tmp_path)) as ckpt:
        with pytest.raises(ct.LeafError, match=r"params\.w was deleted"):
            ckpt.save(1, {"params": {"w": donated}})
        assert ckpt.all_steps() == ()


def test_a_metric_that_is_no_number_is_refused(tmp_path):
    with ct.open(spec_for(tmp_path)) as ckpt, pytest.raises(ct.LeafError, match="metric 'loss'"):
        ckpt.save(1, {"params": jnp.ones(1)}, metrics={"loss": "low"})


def test_steps_only_grow(tmp_path):
    params = {"params": jnp.ones(2)}
    with ct.open(spec_for(tmp_path)) as ckpt:
        ckpt.save(4, params)
        assert isinstance(ckpt.save(4, params), ct.Skipped)
        with pytest.raises(ct.StepOrderError, match="after step 4"):
            ckpt.step(3, params)
        with pytest.raises(ct.StepOrderError):
            ckpt.steps(-1)


def test_a_directory_that_cannot_be_written_fails_at_open(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ct.StorageError, match="cannot be written"):
        ct.open(spec_for(tmp_path / "file" / "run"))


def test_a_run_on_a_disk_that_cannot_be_written_is_restored_and_not_trained(tmp_path, monkeypatch):
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


def test_a_long_reader_does_not_keep_a_writer_out_and_sees_its_steps(tmp_path):
    params = {"params": jnp.ones(2)}
    with ct.open(spec_for(tmp_path)) as ckpt:
        ckpt.save(1, params)
    with ct.open(spec_for(tmp_path)) as reader:
        reader.restore(params)
        with ct.open(spec_for(tmp_path)) as writer:
            writer.restore(params)
            writer.save(2, params)
            writer.wait()
            assert reader.latest_step() == 2
        # Another went on with the run since this one's restore, so what it saves is a branch.
        reader.save(3, params)
        reader.wait()
        assert reader.all_steps() == (1, 3)


def test_a_preemption_notice_saves_and_ends_the_loop(tmp_path, monkeypatch):
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr("jax.experimental.multihost_utils.reached_preemption_sync_point", lambda step: step == 3)
    with ct.open(spec_for(tmp_path, save=ct.EverySteps(100))) as ckpt:
        outcomes = [ckpt.step(step, {"params": jnp.ones(2)}) for step in ckpt.steps(50)]
    assert outcomes[-1].reason == "a preemption notice asked to stop"
    assert len(outcomes) == 3


def test_two_writers_are_refused_and_a_reader_is_not(tmp_path):
    params = {"params": jnp.ones(2)}
    with ct.open(spec_for(tmp_path)) as writer, ct.open(spec_for(tmp_path)) as other:
        writer.save(1, params)
        writer.wait()
        assert other.restore(params).step == 1
        with pytest.raises(ct.RunInUseError, match="is being written"):
            other.save(2, params)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_a_signal_saves_the_step_and_ends_the_loop(tmp_path, number):
    params, seen = {"params": jnp.ones(2)}, []
    before = signal.getsignal(number)
    assert before != signal.SIG_IGN, "a signal that is ignored stays so; do not start these tests in the background"
    with ct.open(spec_for(tmp_path, save=ct.EverySteps(100))) as ckpt:
        for step in ckpt.steps(50):
            if step == 3:
                os.kill(os.getpid(), number)
            seen.append(ckpt.step(step, params))
        assert ckpt.preempted
    assert [type(outcome).__name__ for outcome in seen] == ["Skipped", "Skipped", "Saved"]
    assert "asked to stop" in seen[-1].reason
    assert signal.getsignal(number) is before


def test_the_final_step_without_a_call_to_step_warns(tmp_path):
    with ct.open(spec_for(tmp_path)) as ckpt, pytest.warns(ct.CheckpointWarning, match="final step 2"):
        list(ckpt.steps(2))


def test_an_error_of_the_background_reaches_the_next_call(tmp_path, monkeypatch):
    params = {"params": jnp.ones(2)}

    def fail(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    with ct.open(spec_for(tmp_path, save=ct.EverySteps(1))) as ckpt:
        monkeypatch.setattr("ckpttools.store.orbax.write", fail)
        assert isinstance(ckpt.step(1, params), ct.Started)
        with pytest.raises(ct.DiskSpaceError, match="step 1 could not be saved"):
            ckpt.wait()
        assert ckpt.latest_step() is None
        ckpt.step(2, params)
        ckpt._saver.worker._thread.join(10)
        failed = ckpt.step(3, params, on_error="return")
        assert isinstance(failed, ct.Failed)
        assert isinstance(failed.error, ct.DiskSpaceError)
        monkeypatch.undo()
        ckpt.save(4, params)
    assert not list((tmp_path / ".ckpttools" / "staging").iterdir())
    with ct.open(spec_for(tmp_path)) as ckpt:
        assert ckpt.all_steps() == (4,)


def test_pins_and_best(tmp_path):
    params = {"params": jnp.ones(2)}
    spec = spec_for(tmp_path, save=ct.EverySteps(1), keep=ct.Latest(2) | ct.Best("loss", mode="min"))
    with ct.open(spec) as ckpt:
        for step, loss in enumerate([0.5, 0.1, float("nan"), 0.3, 0.4, 0.6], start=1):
            ckpt.step(step, params, metrics={"loss": loss})
            ckpt.wait()
            if step == 1:
                ckpt.pin(1)
        assert ckpt.all_steps() == (1, 2, 5, 6)
        assert ckpt.best_step() == 2
        assert ckpt.restore(params, step=ct.best("loss")).step == 2
        with pytest.raises(ct.StepNotFoundError):
            ckpt.pin(3)
        with pytest.raises(ct.StepNotFoundError):
            ckpt.restore(params, step=3)
        with pytest.raises(ct.StepNotFoundError, match="recorded: loss"):
            ckpt.restore(params, step=ct.best("acc", mode="max"))
        with pytest.raises(ct.SpecError, match="small or a large 'acc'"):
            ckpt.best_step("acc")


def test_another_spec_goes_on_with_a_run(tmp_path):
    train(spec_for(tmp_path, save=ct.EverySeconds(1000) | ct.EverySteps(2)), 2)
    _, outcomes = train(spec_for(tmp_path, save=ct.OnImprovement("loss", mode="max")), 4)
    assert isinstance(outcomes[0], ct.Started), "the seconds of the one are not the best loss of the other"


def test_a_step_is_pinned_while_it_is_being_saved(tmp_path):
    with ct.open(spec_for(tmp_path, save=ct.EverySteps(1), keep=ct.Latest(2))) as ckpt:
        for step in ckpt.steps(4):
            ckpt.step(step, {"x": jnp.ones(3)})
            if step == 1:
                ckpt.pin(1)
        assert ckpt.all_steps() == (1, 3, 4)


def test_a_pinned_step_outlives_the_branch_that_needs_its_number(tmp_path):
    state = {"x": jnp.ones(3)}
    spec = spec_for(tmp_path, save=ct.EverySteps(1), keep=ct.Latest(2))
    with ct.open(spec) as ckpt:
        for step in ckpt.steps(3):
            ckpt.step(step, state)
        ckpt.pin(3)
    old = next(listed.branch for listed in ct.ls(tmp_path) if listed.step == 3)
    with ct.open(spec) as ckpt:
        ckpt.restore(state, step=2)
        for step in ckpt.steps(8):
            ckpt.step(step, state)
    assert (3, old, True) in [(listed.step, listed.branch, listed.pinned) for listed in ct.ls(tmp_path)]


def test_a_closed_run_saves_no_more(tmp_path):
    with ct.open(spec_for(tmp_path)) as ckpt:
        ckpt.save(1, {"x": jnp.ones(3)})
    with pytest.raises(ct.StepOrderError, match="is closed"):
        ckpt.save(2, {"x": jnp.ones(3)})


@pytest.mark.parametrize("step", [0, -4, 2.0, np.int64(3), True])
def test_a_step_that_is_no_count_says_how_to_count(tmp_path, step):
    with ct.open(spec_for(tmp_path)) as ckpt, pytest.raises(ct.StepOrderError, match=r"ckpt\.steps\(total\)"):
        ckpt.step(step, {"x": jnp.ones(3)})


@pytest.mark.parametrize("on_error", ["raise", "return"])
def test_a_folder_that_vanishes_is_an_error_of_the_disk(tmp_path, on_error):
    with ct.open(spec_for(tmp_path / "run", storage=ct.Storage(asynchronous=False))) as ckpt:
        ckpt.save(1, {"x": jnp.ones(3)})
        (tmp_path / "run").rename(tmp_path / "elsewhere")
        if on_error == "raise":
            with pytest.raises(ct.StorageError, match="is gone"):
                ckpt.save(2, {"x": jnp.ones(3)})
        else:
            outcome = ckpt.save(2, {"x": jnp.ones(3)}, on_error="return")
            assert isinstance(outcome.error, ct.StorageError)
    assert ct.verify(tmp_path / "elsewhere").ok


def test_after_the_last_step_signals_are_what_they_were(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    with ct.open(spec_for(tmp_path)) as ckpt:
        for step in ckpt.steps(2):
            ckpt.step(step, {"x": jnp.ones(3)})
            assert signal.getsignal(signal.SIGTERM) is not before
        assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("step", [np.int64(1), jnp.int32(1), True, "1", "lates", None, 1.0], ids=repr)
def test_what_names_no_step_does_not_restore_the_latest(tmp_path, step):
    state = {"w": np.arange(3.0)}
    with ct.open(spec_for(tmp_path)) as ckpt:
        ckpt.save(1, state)
        ckpt.save(2, state)
        ckpt.wait()
        with pytest.raises(ct.SpecError, match="names no step to restore"):
            ckpt.restore(state, step=step)


def test_a_step_that_no_folder_could_be_named_after_is_refused(tmp_path):
    with ct.open(spec_for(tmp_path)) as ckpt:
        with pytest.raises(ct.StepOrderError, match="18 digits"):
            ckpt.save(10**18, {"w": np.ones(2)})
        ckpt.save(10**18 - 1, {"w": np.ones(2)})
        ckpt.wait()
        assert ckpt.latest_step() == 10**18 - 1


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
def test_metrics_that_cannot_be_compared_are_refused_with_their_name(tmp_path, make, message):
    with ct.open(spec_for(tmp_path)) as ckpt, pytest.raises(ct.LeafError, match=message):
        ckpt.save(1, {"w": np.ones(2)}, metrics=make())


def test_a_pin_of_what_is_no_step_is_refused(tmp_path):
    with ct.open(spec_for(tmp_path)) as ckpt:
        ckpt.save(1, {"w": np.ones(2)})
        with pytest.raises(ct.StepNotFoundError):
            ckpt.pin(np.int64(1))


def test_a_save_in_the_middle_of_another_is_refused_and_threads_take_turns(tmp_path, monkeypatch):
    real, inner = snapshot.take, []
    with ct.open(spec_for(tmp_path)) as ckpt:

        def interrupted(state, buffers):
            if not inner:
                with pytest.raises(ct.StepOrderError, match="in the middle of another"):
                    inner.append(ckpt.save(9, state))
                inner.append("refused")
                thread = threading.Thread(target=lambda: inner.append(ckpt.save(2, state, on_error="return")))
                thread.start()
                time.sleep(0.05)
                inner.append(thread)
            return real(state, buffers)

        monkeypatch.setattr(snapshot, "take", interrupted)
        ckpt.save(1, {"w": np.ones(2)})
        inner[1].join(20)
        ckpt.wait()
        assert ckpt.all_steps() == (1, 2)
    assert [type(outcome) for outcome in inner[2:]] == [ct.Started]


FORKED = """
import multiprocessing, os, sys, time
import numpy as np
import ckpttools as ct

def save(ckpt):
    try:
        ckpt.save(3, {"w": np.ones(2)})
    except ct.RunInUseError:
        os._exit(7)

if __name__ == "__main__":
    with ct.open(ct.CheckpointSpec(directory=sys.argv[1])) as ckpt:
        ckpt.save(1, {"w": np.ones(2)})
        ckpt.wait()
        next(ckpt.steps(5))
        fork = multiprocessing.get_context("fork")
        child = fork.Process(target=save, args=(ckpt,))
        child.start()
        child.join()
        print(child.exitcode)
        sleeper = fork.Process(target=time.sleep, args=(60,))
        sleeper.start()
        time.sleep(0.2)
        sleeper.terminate()
        sleeper.join(10)
        print(sleeper.exitcode)
        sleeper = fork.Process(target=time.sleep, args=(60,))
        sleeper.start()
        print(sleeper.pid, flush=True)
        os.kill(os.getpid(), 9)
"""


def test_what_was_forked_off_neither_saves_nor_swallows_signals_nor_keeps_the_lock(tmp_path):
    command = [sys.executable, "-W", "ignore", "-c", FORKED, str(tmp_path / "run")]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    refused, terminated, orphan = ended.stdout.split()
    try:
        assert (refused, terminated) == ("7", "-15"), ended.stderr
        with ct.open(spec_for(tmp_path / "run")) as ckpt:
            assert ckpt.restore({"w": np.ones(2)}).step == 1
            ckpt.save(2, {"w": np.ones(2)})
    finally:
        os.kill(int(orphan), signal.SIGKILL)


UNCLOSED = """
import sys
import numpy as np
import ckpttools as ct

ckpt = ct.open(ct.CheckpointSpec(directory=sys.argv[1]))
ckpt.save(1, {"w": np.ones(1000)})
ckpt.wait()
ckpt.save(2, {"w": np.ones(1000)})
"""


def test_a_save_that_nobody_waited_for_is_finished_or_reported_at_the_end_of_the_program(tmp_path):
    command = [sys.executable, "-c", UNCLOSED, str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0
    assert len(ct.ls(tmp_path)) == 2 or "step 2" in ended.stderr
    assert ct.verify(tmp_path).ok


def test_a_signal_that_the_program_ignores_stays_ignored(tmp_path):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with ct.open(spec_for(tmp_path)) as ckpt:
            next(ckpt.steps(3))
            signal.raise_signal(signal.SIGINT)
            assert not ckpt.preempted
            assert signal.getsignal(signal.SIGTERM) != signal.SIG_DFL
    finally:
        signal.signal(signal.SIGINT, before)


def test_whoever_asks_twice_to_stop_does_not_wait_for_a_save(tmp_path, monkeypatch):
    go_on = threading.Event()
    monkeypatch.setattr(orbax, "write", lambda *_args, **_kwargs: go_on.wait(30))
    began = time.monotonic()

    def asked_twice():
        with ct.open(spec_for(tmp_path, save=ct.EverySteps(1))) as ckpt:
            for step in ckpt.steps(3):
                ckpt.step(step, {"w": np.ones(2)})
                signal.raise_signal(signal.SIGINT)
                signal.raise_signal(signal.SIGINT)
                time.sleep(20)

    with pytest.raises(KeyboardInterrupt):
        asked_twice()
    assert time.monotonic() - began < 15
    go_on.set()
