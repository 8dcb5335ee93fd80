# SPDX-License-Identifier: Apache-2.0
"""SIGKILL at any moment: no committed step is lost or incomplete, and the final state is that of an unkilled run."""

import os
import shutil
import signal
import subprocess
import sys

import pytest

import ckpttools as ct
from ckpttools.store import commit


def kill(times, seed, *options):
    """Kill runs in a separate process: the server forks, which a process with a JAX backend must not."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.ckpttools.behaviour.killing", str(times), str(seed), *options],
        capture_output=True,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    return done.stdout


def test_eight_kills():
    assert "problems 0" in kill(8, 1)


def test_eight_kills_leave_no_damaged_copy_at_the_mirror():
    assert "problems 0" in kill(8, 3, "mirrored")


_KILLED_BEFORE_IT_PUTS_BACK = """
import os, pathlib, signal, sys
import ckpttools as ct
from ckpttools.store import catalogue, commit

root, protect = pathlib.Path(sys.argv[1]), sys.argv[2]
move = commit.move_to_trash

def move_and_die(directory, path):
    # Another process protects the step after retention has decided, and before the step is moved.
    if protect == "pin":
        catalogue.write_pins(directory, frozenset({int(path.name)}))
    elif protect == "record":
        ct.record(directory, int(path.name), {"loss": 0.5})
    assert move(directory, path).is_dir()
    os.kill(os.getpid(), signal.SIGKILL)

spec = ct.CheckpointSpec(directory=root, keep=ct.Latest(2), storage=ct.Storage(asynchronous=False))
with ct.open(spec) as ckpt:
    ckpt.save(1, {"count": 1})
    ckpt.save(2, {"count": 2})
    commit.move_to_trash = move_and_die
    ckpt.save(3, {"count": 3})
"""


@pytest.mark.parametrize("protect", ["pin", "record", "nothing"])
def test_a_kill_before_a_step_is_moved_back_does_not_lose_it(tmp_path, protect):
    run = tmp_path / "run"
    arguments = [sys.executable, "-c", _KILLED_BEFORE_IT_PUTS_BACK, str(run), protect]
    assert subprocess.run(arguments, check=False).returncode == -signal.SIGKILL
    assert [path.name for path in (run / ".ckpttools" / "trash").iterdir()] == ["1"]
    control = shutil.copytree(run, tmp_path / "control")
    commit.sweep(control)
    assert [row.step for row in ct.ls(control)] == [2, 3], "control: without the recovery it is lost"
    with ct.open(ct.CheckpointSpec(directory=run, keep=ct.Latest(2))) as ckpt:
        ckpt.restore({"count": 0})
        ckpt.steps(9)
        assert ckpt.all_steps() == ((2, 3) if protect == "nothing" else (1, 2, 3))
    assert not list((run / ".ckpttools" / "trash").iterdir())
    assert ct.verify(run).ok


@pytest.mark.long
def test_five_hundred_kills():
    assert "problems 0" in kill(500, 2)


@pytest.mark.long
def test_two_hundred_kills_of_a_run_with_a_mirror():
    assert "problems 0" in kill(200, 4, "mirrored")
