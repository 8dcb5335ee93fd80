# SPDX-License-Identifier: Apache-2.0
"""Assignments combine few levels along the depth of a model."""

from ...models import Tower
from ..spaces import DEPTH, SHAPE, Gated, light_tower, space_of


def test_every_subset_of_a_small_block_is_a_level() -> None:
    _, space = space_of(lambda: Tower(1, SHAPE[-1], block=Gated))
    assert len(space.outline.problems[0].names) == 4
    assert len({level[0].names for level in space.levels}) == 2**4 + 1


def test_levels_rise_from_nothing_saved_to_no_region() -> None:
    _, space = space_of(light_tower)
    sizes = [sum(choice.saved_bytes for choice in level) for level in space.levels]
    assert sizes == sorted(sizes)
    assert space.levels[0][0].names == ()
    assert space.levels[-1][0].names is None


def test_the_first_blocks_save_no_more_than_the_rest() -> None:
    _, space = space_of(light_tower)
    assert all(assignment.first <= assignment.rest for assignment in space.assignments)
    assert all(0 <= assignment.split <= DEPTH for assignment in space.assignments)
    assert len(set(space.assignments)) == len(space.assignments)


def test_a_split_divides_the_blocks_between_two_levels() -> None:
    _, space = space_of(light_tower)
    mixed = next(assignment for assignment in space.assignments if assignment.split == 1)
    assert mixed.get_level(0) == mixed.first != mixed.rest == mixed.get_level(1)
