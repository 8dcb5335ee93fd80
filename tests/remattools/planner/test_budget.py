# SPDX-License-Identifier: Apache-2.0
"""Budgets are parsed into bytes, and anything else is refused before a compile."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import remattools as rt
from remattools.compiler.targets import find_target
from remattools.planner.budget import compute_budget_bytes, is_fraction, require_budget, require_positive, select_bytes


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        (2048, 2048),
        (12e9, 12 * 10**9),
        ("12GiB", 12 * 2**30),
        (" 1.5 kb ", 1500),
        (0.5, 500),
        (1.0, 1000),
        (np.int64(7), 7),
        (np.float32(0.25), 250),
    ],
)
def test_a_budget_becomes_bytes(budget: Any, expected: int) -> None:
    assert compute_budget_bytes(budget, target=find_target("cpu"), plain_bytes=1000) == expected


@pytest.mark.parametrize("budget", [0, -1, True, 1.5, "0.5", "50%", "12 parsecs", "", 10**400, None, float("nan")])
def test_an_invalid_budget_is_refused_with_examples(budget: Any) -> None:
    with pytest.raises(rt.BudgetError, match="not a valid budget") as caught:
        require_budget(budget)
    assert 'budget="12GiB"' in caught.value.fix
    require_budget("fit")  # control


def test_one_is_a_fraction_as_float_but_bytes_as_int() -> None:
    assert is_fraction(1.0)
    assert not is_fraction(1)


@pytest.mark.parametrize("value", ["3", -1, float("inf"), True, 0])
def test_a_limit_has_to_be_a_positive_number(value: Any) -> None:
    with pytest.raises(rt.BudgetError, match="not a valid limit"):
        require_positive("time_limit_s", value, "seconds", "600.0")
    require_positive("time_limit_s", 0, "seconds", "600.0", or_zero=True)  # control


def test_fit_needs_a_target_of_known_memory() -> None:
    with pytest.raises(rt.BudgetError, match="memory of cpu is unknown"):
        compute_budget_bytes("fit", target=find_target("cpu"), plain_bytes=1)
    v5e = dataclasses.replace(find_target("cpu"), name="tpu:v5e:2x2", live=False)
    assert 0.9 * 16 * 2**30 < compute_budget_bytes("fit", target=v5e, plain_bytes=1) < 16 * 2**30


def test_peak_counts_more_than_temporaries() -> None:
    measured = rt.measure(lambda x: jnp.sin(x).sum(), jnp.ones(1000), target="cpu")
    assert select_bytes(measured, "temp") == measured.temp_bytes
    assert select_bytes(measured, "peak") == measured.total_bytes > measured.temp_bytes
