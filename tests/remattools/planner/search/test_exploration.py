# SPDX-License-Identifier: Apache-2.0
"""What is compiled next: assignments that may beat their prediction, and points along the whole curve."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

import remattools as rt
from remattools.compiler.out_of_memory import OutOfMemory
from remattools.planner.search.exploration import Exploration
from remattools.planner.search.space import Space
from remattools.planner.search.to_rules import write_rules

from ...models import Tower
from ..spaces import SHAPE, Gated, exploration, light_tower, space_of


def _surprising(space: Space, small: int, *, least: int, other: int) -> Exploration:
    """A search in which one assignment takes less than others, against its prediction."""
    some = rt.measure(jnp.sin, jnp.ones(3), target="cpu")
    by_rules = {write_rules(space, a): n for n, a in reversed(list(enumerate(space.assignments)))}

    def measured_by(rules: rt.Rules) -> rt.Measurement:
        return dataclasses.replace(some, temp_bytes=least if by_rules[rules] == small else other)

    search = exploration(space, measured_by)
    search.compile_assignment(space.assignments.index(space.plain))
    return search


@pytest.mark.parametrize("small", [8, 13])
def test_a_budget_below_every_prediction_is_searched_for(small: int) -> None:
    _, space = space_of(lambda: Tower(1, SHAPE[-1], block=Gated))
    search = _surprising(space, small, least=100_000, other=300_000)
    while small not in search.points and (number := search.propose(110_000, None)) is not None:
        search.compile_assignment(number)
    assert small in search.points


def test_no_prediction_is_negative() -> None:
    _, space = space_of(light_tower)
    some = dataclasses.replace(rt.measure(jnp.sin, jnp.ones(3), target="cpu"), temp_bytes=0)
    search = exploration(space, lambda _: some)
    plain, full = map(space.assignments.index, (space.plain, space.full_remat))
    search.compile_assignment(plain)
    assert search.points[plain].predicted is None
    assert search.compute_posterior().bytes[full] < 0  # control: the model alone says that
    search.compile_assignment(full)
    predicted = search.points[full].predicted
    assert predicted is not None
    assert predicted.bytes >= 0


def test_a_time_limit_is_searched_if_the_plain_model_fails() -> None:
    _, space = space_of(light_tower)
    some = rt.measure(jnp.sin, jnp.ones(3), target="cpu")
    full = OutOfMemory(needed_bytes=2**40, limit_bytes=2**30, message="full")
    search = exploration(space, lambda _: dataclasses.replace(some, out_of_memory=full))
    search.compile_assignment(space.assignments.index(space.plain))
    number = search.propose(None, 1.0)
    assert number is not None
    assert space.bytes[number] == space.bytes.min() < space.bytes[space.assignments.index(space.plain)]


def test_the_search_pursues_the_limit_that_is_missed() -> None:
    """Every point is fast enough and none is within the budget: the search should reduce memory, not time."""
    _, space = space_of(light_tower)
    some = rt.measure(jnp.sin, jnp.ones(3), target="cpu")
    search = exploration(space, lambda _: dataclasses.replace(some, temp_bytes=2**40, estimated_cycles=10))
    search.compile_assignment(space.assignments.index(space.plain))
    number = search.propose(2**20, 1e12)
    assert number is not None
    assert space.bytes[number] < space.bytes[space.assignments.index(space.plain)]


def test_a_frontier_spreads_over_the_whole_curve() -> None:
    """Where the model is right, few compiles come close to the curve at every budget."""
    _, space = space_of(light_tower)
    some = rt.measure(jnp.sin, jnp.ones(3), target="cpu")
    by_rules = {write_rules(space, a): n for n, a in reversed(list(enumerate(space.assignments)))}

    def as_predicted(rules: rt.Rules) -> rt.Measurement:
        return dataclasses.replace(some, temp_bytes=int(space.bytes[by_rules[rules]]))

    search = exploration(space, as_predicted)
    search.compile_assignment(space.assignments.index(space.plain))
    for _ in range(7):
        number = search.propose_for_frontier()
        if number is None:
            break
        search.compile_assignment(number)
    limits = np.geomspace(space.bytes.min() * 1.01, max(point.bytes for point in search.points.values()), 20)
    times = search.plain_cycles + space.cycles
    for limit in limits:
        reached = min((p.cycles for p in search.points.values() if p.bytes <= limit), default=np.inf)
        possible = times[space.bytes <= limit].min()
        assert reached <= 1.1 * possible, limit
