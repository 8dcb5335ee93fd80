# SPDX-License-Identifier: Apache-2.0
"""A search ends at its limits, and says why."""

import dataclasses
import itertools

import jax.numpy as jnp
import pytest

import remattools as rt
from remattools.planner.search.history import RuleHistory
from remattools.planner.search.minimum import Minimum
from remattools.planner.search.run_search import Limits, run_search

from ..spaces import exploration, light_tower, space_of


def _search(limits: Limits, *, is_within: bool) -> tuple[str, int]:
    """Return what ended a search to which three assignments are proposed, and how many points it compiled."""
    model, space = space_of(light_tower)
    some = rt.measure(jnp.sin, jnp.ones(3), target="cpu")
    search = exploration(space, lambda _: dataclasses.replace(some, temp_bytes=1000))
    search.add_plain(some)
    others = (number for number, one in enumerate(space.assignments) if one not in (space.plain, space.full_remat))
    proposals = itertools.islice(others, 3)
    ended = run_search(
        search,
        Minimum(search, model),
        RuleHistory(None, space.outline, "cpu"),
        lambda _: next(proposals, None),
        lambda _: is_within,
        limits,
    )
    return ended, len(search.all_points)


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        pytest.param(Limits(3, False, None), ("max_compiles", 3), id="number of compiles"),
        pytest.param(Limits(99, False, 0.0), ("time_limit", 1), id="time"),
        pytest.param(Limits(99, False, None), ("converged", 4), id="nothing proposed"),
    ],
)
def test_a_search_ends_at_its_limits(limits: Limits, expected: tuple[str, int]) -> None:
    assert _search(limits, is_within=True) == expected


def test_the_minimum_is_compiled_beyond_the_limit() -> None:
    limits = Limits(2, False, None)
    assert _search(limits, is_within=True) == ("max_compiles", 2)  # control
    assert _search(limits, is_within=False)[1] > 2
