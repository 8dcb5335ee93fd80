# SPDX-License-Identifier: Apache-2.0
"""A space holds every assignment with its predictions, which measurements correct."""

import numpy as np
import pytest

from remattools.planner.search.space import Space

from ..spaces import DEPTH, light_tower, space_of


@pytest.fixture(scope="module")
def space() -> Space:
    return space_of(light_tower)[1]


def test_every_assignment_has_a_prediction(space: Space) -> None:
    count = len(space.assignments)
    assert count > len(space.levels)
    for column in (space.bytes, space.cycles, space.link_cycles):
        assert column.shape == (count,)
    assert space.features.shape[0] == count


def test_members_are_the_blocks_in_the_order_of_their_visits(space: Space) -> None:
    assert space.members == [("layers", number) for number in range(DEPTH)]
    assert space.groupable_paths == {("layers",)}


def test_both_ends_of_the_space_are_assignments(space: Space) -> None:
    plain, full = space.assignments.index(space.plain), space.assignments.index(space.full_remat)
    assert space.cycles[plain] == 0 < space.cycles[full]
    assert space.bytes[full] < space.bytes[plain]


def test_a_measurement_corrects_its_neighbours(space: Space) -> None:
    shifted, deviations = space.correct_predictions("bytes", {0: space.bytes[0] + 1e6})
    assert (shifted[0], deviations[0]) == (space.bytes[0] + 1e6, 0)
    assert np.all(shifted > space.bytes)


def test_bytes_and_cycles_are_corrected_apart(space: Space) -> None:
    cycles, _ = space.correct_predictions("cycles", {0: 2 * space.cycles[0]})
    assert cycles[0] == 2 * space.cycles[0]
    exact, _ = space.correct_predictions("bytes", {0: space.bytes[0]})
    np.testing.assert_allclose(exact, space.bytes)  # control: a prediction that was right changes nothing
