# SPDX-License-Identifier: Apache-2.0
"""SIGKILL at any moment: no committed step is lost or incomplete, and the final state is that of an unkilled run."""

import os
import subprocess
import sys

import pytest


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


def test_a_dozen_kills():
    assert "problems 0" in kill(12, 1)


def test_a_dozen_kills_leave_no_damaged_copy_at_the_mirror():
    assert "problems 0" in kill(12, 3, "mirrored")


@pytest.mark.long
def test_five_hundred_kills():
    assert "problems 0" in kill(500, 2)


@pytest.mark.long
def test_two_hundred_kills_of_a_run_with_a_mirror():
    assert "problems 0" in kill(200, 4, "mirrored")
