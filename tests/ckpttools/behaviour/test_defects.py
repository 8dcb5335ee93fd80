# SPDX-License-Identifier: Apache-2.0
"""The defects of plain Orbax, each shown there (the control) and absent here.

Lettered as in docs/ckpttools.md. If a control no longer shows its defect, Orbax has fixed it: update the page.
"""

import gc
import os
import pathlib
import re
import signal
import subprocess
import sys
import textwrap
import time
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as v0
import pytest
from orbax.checkpoint import v1
from orbax.checkpoint.checkpoint_managers import preservation_policy

import ckpttools as ct
from ckpttools.store import orbax as array_io

STATE = {"w": jnp.arange(16.0)}


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="orbax")
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        yield


def manager(directory, **options):
    return v0.CheckpointManager(directory, options=v0.CheckpointManagerOptions(**options))


def plain_save(mngr, step, metrics=None, state=STATE):
    saved = mngr.save(step, args=v0.args.StandardSave(state), metrics=metrics)
    mngr.wait_until_finished()
    return saved


def our(directory, **changes):
    fields = {"save": ct.EverySteps(1), "keep": ct.All(), **changes}
    return ct.open(ct.CheckpointSpec(directory=directory, **fields))


def failure_of_orbax(directory, template):
    """Type and message of the error of a plain load; the error itself holds coroutines that complain when collected."""
    text = ""
    with array_io._mute_leftovers():
        try:
            v1.load_checkpointables(directory, {"model": template})
        except Exception as error:
            text = f"{type(error).__name__}: {error}"
        gc.collect()
    return text


def save_all(ckpt, losses, start=1):
    for step, loss in enumerate(losses, start=start):
        ckpt.step(step, {"model": STATE}, metrics={"loss": loss})
        ckpt.wait()


def test_a_metrics_are_stored_and_best_survives_reopening(tmp_path):
    policy = preservation_policy.BestN(get_metric_fn=lambda m: m["loss"], n=2, reverse=True)
    with manager(tmp_path / "plain", preservation_policy=policy) as mngr:
        for step, loss in enumerate([0.5, 0.1, 0.3], start=1):
            plain_save(mngr, step, {"loss": loss})
    with manager(tmp_path / "plain", preservation_policy=policy) as mngr:
        assert mngr.best_step() != 2, "control"
    with our(tmp_path / "ours", keep=ct.Best("loss", mode="min", n=2)) as ckpt:
        save_all(ckpt, [0.5, 0.1, 0.3])
    with our(tmp_path / "ours", keep=ct.Best("loss", mode="min", n=2)) as ckpt:
        assert ckpt.best_step() == 2


def test_b_the_newest_step_survives_a_worsening_loss(tmp_path):
    with manager(tmp_path / "plain", max_to_keep=2, best_fn=lambda m: -m["loss"]) as mngr:
        for step, loss in enumerate([0.1, 0.2, 0.3], start=1):
            assert plain_save(mngr, step, {"loss": loss})
        assert 3 not in mngr.all_steps(), "control"
    with our(tmp_path / "ours", keep=ct.Best("loss", mode="min", n=2)) as ckpt:
        save_all(ckpt, [0.1, 0.2, 0.3])
        assert ckpt.latest_step() == 3
        assert ckpt.best_step() == 1


def test_c_nan_is_never_best(tmp_path):
    with manager(tmp_path / "plain", max_to_keep=1, best_fn=lambda m: m["loss"], best_mode="min") as mngr:
        for step, loss in enumerate([0.1, float("nan")], start=1):
            plain_save(mngr, step, {"loss": loss})
        assert mngr.best_step() == 2, "control"
        assert 1 not in mngr.all_steps(), "control"
    with our(tmp_path / "ours", keep=ct.Best("loss", mode="min")) as ckpt:
        save_all(ckpt, [0.1, float("nan"), 0.5])
        assert ckpt.best_step() == 1
        assert 1 in ckpt.all_steps()


def test_d_after_a_rollback_saves_are_saved(tmp_path):
    with manager(tmp_path / "plain") as mngr:
        for step in (60, 80, 100):
            plain_save(mngr, step)
        mngr.restore(60, args=v0.args.StandardRestore(STATE))
        assert not plain_save(mngr, 70, state={"w": -STATE["w"]}), "control"
    with our(tmp_path / "ours") as ckpt:
        for step in (60, 80, 100):
            ckpt.save(step, {"model": STATE})
        ckpt.restore({"model": STATE}, step=60)
        assert isinstance(ckpt.save(70, {"model": STATE}), ct.Started)
        ckpt.wait()
        assert ckpt.latest_step() == 70


def test_e_a_failed_background_save_is_never_called_saved(tmp_path, monkeypatch):
    """Orbax's manager reports the step before it is on the disk."""
    with manager(tmp_path / "plain", enable_async_checkpointing=True) as mngr:
        assert mngr.save(1, args=v0.args.StandardSave({"w": jnp.zeros(4_000_000)}))
        assert mngr.latest_step() == 1, "control: reported at once"
        mngr.wait_until_finished()

    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    with our(tmp_path / "ours") as ckpt:
        monkeypatch.setattr(array_io, "write", full)
        assert isinstance(ckpt.step(1, {"model": STATE}), ct.Started)
        assert ckpt.latest_step() is None
        with pytest.raises(ct.DiskSpaceError):
            ckpt.wait()
        assert ckpt.latest_step() is None


def test_f_a_stray_directory_is_not_a_step(tmp_path):
    with manager(tmp_path / "plain") as mngr:
        plain_save(mngr, 1)
    (tmp_path / "plain" / "7").mkdir()
    with manager(tmp_path / "plain") as mngr:
        assert mngr.latest_step() == 7, "control"
    with our(tmp_path / "ours") as ckpt:
        ckpt.save(1, {"model": STATE})
    (tmp_path / "ours" / "7").mkdir()
    with our(tmp_path / "ours") as ckpt:
        assert ckpt.latest_step() == 1
        assert ckpt.restore({"model": STATE}).step == 1


_PLAIN_LOOP = """
import sys, time
import jax.numpy as jnp
import orbax.checkpoint as v0
options = v0.CheckpointManagerOptions(save_interval_steps=1000)
with v0.CheckpointManager(sys.argv[1], options=options) as mngr:
    for step in range(1, 10_000):
        mngr.save(step, args=v0.args.StandardSave({"w": jnp.ones(4)})) if step > 1 else None
        print(step, flush=True)
        time.sleep(0.01)
"""
_OUR_LOOP = """
import sys, time
import jax.numpy as jnp
import ckpttools as ct
with ct.open(ct.CheckpointSpec(directory=sys.argv[1], save=ct.EverySteps(1000))) as ckpt:
    for step in ckpt.steps(10_000):
        ckpt.step(step, {"model": {"w": jnp.ones(4)}})
        print(step, flush=True)
        time.sleep(0.01)
"""


def _terminate(program, directory, *, twice=False):
    """Run a training loop, send SIGTERM while it trains; return the exit status and the saved steps."""
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program), str(directory)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        text=True,
    )
    for line in process.stdout:
        if int(line) >= 3:
            process.send_signal(signal.SIGTERM)
            break
    process.stdout.read()
    process.stdout.close()
    return process.wait(60), [int(path.name) for path in pathlib.Path(directory).iterdir() if path.name.isdigit()]


def test_g_sigterm_saves_and_exits_cleanly(tmp_path):
    status, steps = _terminate(_PLAIN_LOOP, tmp_path / "plain")
    assert status == -signal.SIGTERM, "control"
    assert max(steps, default=0) < 3, "control: the step at the signal is lost"
    status, steps = _terminate(_OUR_LOOP, tmp_path / "ours")
    assert status == 0
    assert max(steps) >= 3


def test_g_a_second_signal_ends_the_process_at_once(tmp_path):
    stubborn = _OUR_LOOP.replace("time.sleep(0.01)", "time.sleep(0.01 if step < 3 else 60)")
    began = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-c", stubborn, str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        text=True,
    )
    for line in process.stdout:
        if int(line) == 3:
            break
    process.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    process.stdout.close()
    assert process.wait(60) == -signal.SIGTERM
    assert time.monotonic() - began < 50


def test_h_the_final_step_is_saved_off_the_interval(tmp_path):
    with manager(tmp_path / "plain", save_interval_steps=4) as mngr:
        for step in range(1, 7):
            plain_save(mngr, step)
        assert mngr.latest_step() != 6, "control"
    with our(tmp_path / "ours", save=ct.EverySteps(4)) as ckpt:
        for step in ckpt.steps(6):
            ckpt.step(step, {"model": STATE})
        assert ckpt.all_steps() == (4, 6)


def test_i_another_dtype_is_refused_and_not_truncated(tmp_path):
    weights, wrong = {"w": jnp.full(3, 0.7)}, {"w": jnp.zeros(3, jnp.int32)}
    with manager(tmp_path / "plain") as mngr:
        plain_save(mngr, 1, state=weights)
        restored = mngr.restore(1, args=v0.args.StandardRestore(wrong))
    np.testing.assert_array_equal(restored["w"], 0, err_msg="control")
    with our(tmp_path / "ours") as ckpt:
        ckpt.save(1, {"model": weights})
        with pytest.raises(ct.StructureError, match=r"model\.w: float32\[3\] on disk, int32\[3\] here"):
            ckpt.restore({"model": wrong})


def test_j_another_shape_is_called_another_shape(tmp_path):
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    template = {"w": jax.ShapeDtypeStruct((8,), jnp.float32, sharding=sharding)}
    v1.save_checkpointables(tmp_path / "plain", {"model": STATE})
    assert re.match("NoEntryError.*incompatible handler", failure_of_orbax(tmp_path / "plain", template)), "control"
    with our(tmp_path / "ours") as ckpt:
        ckpt.save(1, {"model": STATE})
        with pytest.raises(ct.StructureError, match=r"model\.w: float32\[16\] on disk, float32\[8\] here"):
            ckpt.restore({"model": template})


def test_k_a_relative_directory_and_arrays_without_elements_work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"(?i)absolute|zero"):
        v0.StandardCheckpointer().save("plain", {"empty": jnp.zeros((0, 3))})
    state = {"model": {"empty": jnp.zeros((0, 3)), **STATE}}
    with our("ours") as ckpt:
        monkeypatch.chdir("/")
        ckpt.save(1, state)
        ckpt.wait()
        assert ckpt.restore(state).state["model"]["empty"].shape == (0, 3)
    assert (tmp_path / "ours" / "1").is_dir()


def test_l_a_background_save_references_no_memory_of_the_state(tmp_path, monkeypatch):
    """What stalls the next donated update is a view of the state; the benchmark measures the stall itself."""
    passed = {}
    real = array_io.write

    def spy(directory, snapshot, **options):
        passed.update(snapshot.items["model"].host_arrays)
        real(directory, snapshot, **options)

    monkeypatch.setattr(array_io, "write", spy)
    array = jnp.arange(100_000.0)
    with our(tmp_path) as ckpt:
        ckpt.save(1, {"model": {"w": array}})
        ckpt.wait()
        (copy,) = passed.values()
        assert not np.shares_memory(copy, np.asarray(array))
        first = copy
        ckpt.save(2, {"model": {"w": array}})
        ckpt.wait()
        assert passed[("w",)] is first, "the buffers are reused, so that host memory stays at one state"
