# SPDX-License-Identifier: Apache-2.0
"""Any system call of a background save may fail: the next call raises it, and no committed step is lost."""

import random

import pytest

from tests.ckpttools.behaviour import syscalls

pytestmark = pytest.mark.skipif(not syscalls.can_trace(), reason="needs strace, and permission to attach it")
ALL = [(call, error, number) for call, error, numbers in syscalls.PLAN for number in numbers]


def sweep(tmp_path, plan):
    found = list(syscalls.trials(tmp_path, iter(plan)))
    assert [trial for trial in found if trial.problems] == []
    return [trial.outcome for trial in found]


def test_calls_of_each_kind_that_fail(tmp_path):
    chosen = [("fsync", "EIO", 2), ("writev", "ENOSPC", 1), ("rename", "EIO", 1), ("mkdir", "ENOSPC", 1)]
    outcomes = sweep(tmp_path, [*chosen, *random.Random(1).sample(ALL, 6)])
    assert outcomes.count("failed") >= 3


def test_a_call_that_is_never_made_fails_nothing(tmp_path):
    """The control: tracing alone does not make a save fail."""
    assert sweep(tmp_path, [("rename", "EIO", 1000)]) == ["not met"]


@pytest.mark.long
def test_every_call_that_fails(tmp_path):
    outcomes = sweep(tmp_path, ALL)
    assert outcomes.count("failed") >= 60
