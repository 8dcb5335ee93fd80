# SPDX-License-Identifier: Apache-2.0
"""One of the two lists of pins suffices, and a run opens without both."""

import pytest

import ckpttools as ct
from ckpttools.store import catalogue, layout


@pytest.fixture
def run(tmp_path):
    with ct.open(ct.CheckpointSpec(directory=tmp_path)) as ckpt:
        ckpt.save(100, {"count": 100})
    return tmp_path


@pytest.mark.parametrize("damage", ["{", "[" * 100_000, '{"steps": [30], "digest": "xxh3:0"}', "[1e400]"])
def test_damaged_pins_are_read_from_their_second_copy(run, damage):
    assert catalogue.has_intact_pins(run)
    catalogue.write_pins(run, frozenset({20}))
    layout.get_control_path(run, "pins.json").write_text(damage)
    assert catalogue.read_pins(run) == frozenset({20})
    assert not catalogue.has_intact_pins(run)


def test_without_a_whole_list_of_pins_the_run_still_opens(run):
    layout.get_control_path(run, "pins.json").write_text("{")
    assert catalogue.read_pins(run) == frozenset()
    with ct.open(ct.CheckpointSpec(directory=run)) as ckpt:
        assert ckpt.latest_step() == 100
