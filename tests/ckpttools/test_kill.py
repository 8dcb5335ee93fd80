# SPDX-License-Identifier: Apache-2.0
"""SIGKILL at any moment: no committed step is lost, none is half there, and the end is that of an unbroken run."""

import os
import subprocess
import sys

import pytest


def kill(times, seed):
    """In a process of its own: the server forks, which a process with a JAX backend must not."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.ckpttools.killing", str(times), str(seed)],
        capture_output=True,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    return done.stdout


def test_a_dozen_kills():
    assert "problems 0" in kill(12, 1)


@pytest.mark.long
def test_five_hundred_kills():
    assert "problems 0" in kill(500, 2)
