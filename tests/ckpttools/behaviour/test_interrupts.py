# SPDX-License-Identifier: Apache-2.0
"""A run whose calls are interrupted at random stays whole; `make bench` makes thousands of trials."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[3]


def run_trials(count, seed, *options):
    command = [sys.executable, "-m", "tests.ckpttools.behaviour.interrupts", str(count), str(seed), *options]
    ended = subprocess.run(
        command, capture_output=True, text=True, timeout=1500, cwd=ROOT, env={**os.environ, "JAX_PLATFORMS": "cpu"}
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    return json.loads(ended.stdout)


def test_an_interrupt_at_any_moment_leaves_a_whole_run():
    found = run_trials(8, 5)
    assert found["raised"] >= 4, "half of the signals may come too late, the trace events come in any case"
    assert found["failures"] == []


@pytest.mark.long
def test_two_hundred_interrupts_leave_whole_runs():
    found = run_trials(200, 6)
    assert found["raised"] >= 120
    assert found["failures"] == []
