# SPDX-License-Identifier: Apache-2.0
"""How much host memory saves and restores take, measured from outside in processes of their own."""

import pathlib

import pytest

from tests.ckpttools.behaviour import memory

pytestmark = pytest.mark.skipif(not pathlib.Path("/proc/self/clear_refs").exists(), reason="the mark is Linux's")


def test_background_saves_in_a_row_with_donated_updates_take_one_copy_of_the_state():
    assert memory.peak_of("save: ckpttools, four in a row with donated updates", 200, 10) < 1.2


def test_a_restore_takes_the_state_and_little_more():
    """On CPU the staged arrays and the restored ones are both host memory: each goes as the other comes."""
    assert memory.peak_of("restore: ckpttools", 200, 10, **memory.GIVEN_BACK) < 1.4
