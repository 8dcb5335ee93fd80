# SPDX-License-Identifier: Apache-2.0
"""The next compile is the one expected to improve the result most within the limits."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

import remattools as rt
from remattools.planner.result import Point, Prediction
from remattools.planner.search.next_compile import Posterior, choose_for_frontier, choose_for_limits, find_best_point

OPEN = np.array([False, True, True, True])


@pytest.fixture(scope="module")
def plain() -> Point:
    return Point(
        rules=rt.Rules({}),
        predicted=Prediction(bytes=100, cycles=10.0),
        measured=rt.measure(jnp.sin, jnp.ones(3), target="cpu"),
        bytes=100,
        cycles=10.0,
    )


def expect(sizes: list[float], cycles: list[float], std: float = 0.0) -> Posterior:
    return Posterior(np.array(sizes), np.full(4, std), np.array(cycles), np.zeros(4))


def test_the_fastest_that_is_expected_within_the_budget_comes_first(plain: Point) -> None:
    expected = expect([100, 60, 40, 20], [10, 11, 12, 15])
    assert choose_for_limits(expected, OPEN, [plain], max_bytes=50, max_cycles=None) == 2
    assert choose_for_limits(expected, OPEN, [plain], max_bytes=70, max_cycles=None) == 1


def test_with_a_time_limit_the_smallest_within_it_comes_first(plain: Point) -> None:
    expected = expect([100, 60, 40, 20], [10, 11, 12, 15])
    assert choose_for_limits(expected, OPEN, [plain], max_bytes=None, max_cycles=12.5) == 2


def test_nothing_is_compiled_without_an_expected_improvement(plain: Point) -> None:
    """The plain model is the fastest and within the budget."""
    expected = expect([100, 60, 40, 20], [10, 11, 12, 15])
    assert choose_for_limits(expected, OPEN, [plain], max_bytes=100, max_cycles=None) is None
    better = expect([100, 60, 40, 20], [10, 9, 12, 15])
    assert choose_for_limits(better, OPEN, [plain], max_bytes=100, max_cycles=None) == 1  # control


def test_an_unreachable_budget_is_approached(plain: Point) -> None:
    expected = expect([100, 60, 40, 20], [10, 11, 12, 15])
    assert choose_for_limits(expected, OPEN, [plain], max_bytes=5, max_cycles=None) == 3


def test_a_frontier_begins_with_full_remat(plain: Point) -> None:
    expected = expect([100, 60, 40, 20], [10, 11, 12, 15])
    assert choose_for_frontier(expected, OPEN, [plain], full_remat=3) == 3
    assert choose_for_frontier(expected, np.zeros(4, bool), [plain], full_remat=3) is None


def test_the_best_point_is_the_fastest_within_the_budget(plain: Point) -> None:
    small = dataclasses.replace(plain, bytes=50, cycles=12.0)
    assert find_best_point([plain, small], 60, None) is small
    assert find_best_point([plain, small], 100, None) is plain
    assert find_best_point([plain, small], None, 20.0) is small  # the smallest within a time limit
    assert find_best_point([plain, small], 40, None) is None
