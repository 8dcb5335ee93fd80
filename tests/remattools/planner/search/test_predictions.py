# SPDX-License-Identifier: Apache-2.0
"""Predictions order assignments: saving costs memory, recomputing costs time. Offloading: `test_offloading`."""

import itertools

import numpy as np
import pytest

from remattools.planner.model.block_groups import Grouping
from remattools.planner.search.assignments import Assignment
from remattools.planner.search.predictions import Predictions, predict_assignments
from remattools.planner.search.space import Space

from ...models import Tower
from ..spaces import DEPTH, SHAPE, Gated, light_tower, space_of


@pytest.fixture(scope="module")
def space() -> Space:
    return space_of(light_tower)[1]


def _predict(space: Space, *assignments: Assignment) -> Predictions:
    grouping = Grouping(space.outline, space.members)
    members = np.arange(DEPTH)
    return predict_assignments(space.outline, space.levels, assignments, grouping=grouping, members=members)


def test_saving_more_is_predicted_to_be_faster_and_larger() -> None:
    """Memory rises between the ends only: recomputing a value can need more than saving it."""
    _, space = space_of(lambda: Tower(4, 16), (2, 16, 16))
    regions = slice(0, len(space.levels) - 1)
    assert all(a >= b for a, b in itertools.pairwise(space.cycles[regions]))
    assert space.cycles[0] > 0
    assert space.bytes[0] == space.bytes[regions].min() < space.bytes[regions].max()


def test_the_plain_model_takes_no_further_cycles(space: Space) -> None:
    predicted = _predict(space, space.plain, space.full_remat)
    assert predicted.cycles[0] == 0 < predicted.cycles[1]
    assert predicted.bytes[0] > predicted.bytes[1] > 0


def test_groups_recompute_more_and_save_less(space: Space) -> None:
    alone, grouped = Assignment(0, 0, DEPTH), Assignment(0, 0, DEPTH, 4)
    predicted = _predict(space, alone, grouped)
    assert predicted.cycles[0] < predicted.cycles[1]
    assert predicted.bytes[0] > predicted.bytes[1]


def test_features_are_at_most_one_in_size(space: Space) -> None:
    predicted = _predict(space, *space.assignments)
    assert np.abs(predicted.features).max(axis=0).max() == 1
    assert np.isfinite(predicted.features).all()


def test_names_have_shares_only_where_all_subsets_are_tried(space: Space) -> None:
    assert _predict(space, space.plain).name_shares is None
    _, gated = space_of(lambda: Tower(1, SHAPE[-1], block=Gated))
    shares = predict_assignments(
        gated.outline,
        gated.levels,
        [gated.full_remat, gated.plain],
        grouping=Grouping(gated.outline, gated.members),
        members=np.arange(1),
    ).name_shares
    assert shares is not None
    assert shares.tolist() == [[0, 0, 0, 0, 0], [0, 0, 0, 0, 1]]  # four names, and "without a region"
