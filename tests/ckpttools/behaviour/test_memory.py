# SPDX-License-Identifier: Apache-2.0
"""How much host memory saves and restores take, measured in separate processes."""

import pathlib

import pytest

from tests.ckpttools.behaviour import memory

pytestmark = pytest.mark.skipif(not pathlib.Path("/proc/self/clear_refs").exists(), reason="needs Linux")


def test_background_saves_with_donated_updates_copy_the_state_once():
    assert memory.peak_of("save: ckpttools, four in a row with donated updates", 200, 10) < 1.2


def test_a_restore_takes_the_state_and_little_more():
    """On CPU the loaded arrays and the restored ones are both host memory: one is freed as the other is placed."""
    assert memory.peak_of("restore: ckpttools", 200, 10, **memory.GIVEN_BACK) < 1.4
