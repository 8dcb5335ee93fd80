# SPDX-License-Identifier: Apache-2.0
"""Background saves: errors reach the next call, and nothing is lost at exit."""

import subprocess
import sys

import jax.numpy as jnp
import pytest

import ckpttools as ct

from .runs import spec_for


def test_an_error_of_a_background_save_reaches_the_next_call(tmp_path, monkeypatch):
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
        ckpt._saver.worker.wait(10)
        failed = ckpt.step(3, params, on_error="return")
        assert isinstance(failed, ct.Failed)
        assert isinstance(failed.error, ct.DiskSpaceError)
        monkeypatch.undo()
        ckpt.save(4, params)
    assert not list((tmp_path / ".ckpttools" / "staging").iterdir())
    with ct.open(spec_for(tmp_path)) as ckpt:
        assert ckpt.all_steps() == (4,)


@pytest.mark.parametrize("on_error", ["raise", "return"])
def test_a_run_directory_that_vanishes_is_a_storage_error(tmp_path, on_error):
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


UNCLOSED = """
import sys
import numpy as np
import ckpttools as ct

ckpt = ct.open(ct.CheckpointSpec(directory=sys.argv[1]))
ckpt.save(1, {"w": np.ones(1000)})
ckpt.wait()
ckpt.save(2, {"w": np.ones(1000)})
"""


def test_an_unclosed_session_finishes_or_reports_its_save_at_exit(tmp_path):
    command = [sys.executable, "-c", UNCLOSED, str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0
    assert len(ct.ls(tmp_path)) == 2 or "step 2" in ended.stderr
    assert ct.verify(tmp_path).ok
