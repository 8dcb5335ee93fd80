# SPDX-License-Identifier: Apache-2.0
"""The checks that values of a spec share name the owner, the field and a legal value."""

import math

import pytest

import ckpttools as ct
from ckpttools.spec import checks

LEGAL = [
    pytest.param(checks.require_count, ("Latest", "n", 1), id="a count"),
    pytest.param(checks.require_positive, ("Storage", "timeout_s", 0.5), id="seconds"),
    pytest.param(checks.require_name, ("Best", "metric", "val_loss"), id="a name"),
    pytest.param(checks.require_mode, ("Best", "max"), id="a mode"),
    pytest.param(checks.require_choice, ("Integrity", "digest", "xxh3", ("xxh3", "sha256")), id="a choice"),
    pytest.param(checks.require_steps, ("AtSteps", (1, 10)), id="steps"),
    pytest.param(checks.require_steps, ("AtSteps", ()), id="no steps"),
]


@pytest.mark.parametrize(("check", "arguments"), LEGAL)
def test_legal_values_pass(check, arguments):
    """Control."""
    assert check(*arguments) is None


@pytest.mark.parametrize(
    ("check", "arguments", "fix"),
    [
        pytest.param(checks.require_count, ("Latest", "n", 0), "Latest(n=1)", id="a count of 0"),
        pytest.param(checks.require_count, ("Latest", "n", True), "Latest(n=1)", id="a bool as a count"),
        pytest.param(checks.require_count, ("Latest", "n", 2.0), "Latest(n=1)", id="a float as a count"),
        pytest.param(checks.require_positive, ("Storage", "timeout_s", 0), "Storage(timeout_s=900)", id="0 seconds"),
        pytest.param(checks.require_positive, ("Storage", "timeout_s", math.nan), "Storage(timeout_s=900)", id="NaN"),
        pytest.param(checks.require_positive, ("Storage", "timeout_s", math.inf), "Storage(timeout_s=900)", id="inf"),
        pytest.param(checks.require_positive, ("Storage", "timeout_s", True), "Storage(timeout_s=900)", id="a bool"),
        pytest.param(checks.require_name, ("Best", "metric", " "), 'Best(metric="val_loss")', id="a blank name"),
        pytest.param(checks.require_name, ("Best", "metric", 3), 'Best(metric="val_loss")', id="a number as a name"),
        pytest.param(checks.require_mode, ("Best", "low"), 'mode="min" for a loss', id="no direction"),
        pytest.param(
            checks.require_choice,
            ("Integrity", "digest", "md5", ("xxh3", "sha256")),
            "Integrity(digest='xxh3')",
            id="an unknown choice",
        ),
        pytest.param(checks.require_steps, ("AtSteps", [1]), "AtSteps(steps=", id="a list"),
        pytest.param(checks.require_steps, ("AtSteps", (2, 1)), "AtSteps(steps=", id="unordered"),
        pytest.param(checks.require_steps, ("AtSteps", (1, 1)), "AtSteps(steps=", id="a repeat"),
        pytest.param(checks.require_steps, ("AtSteps", (0,)), "AtSteps(steps=", id="step 0"),
    ],
)
def test_illegal_values_are_refused_with_a_legal_one(check, arguments, fix):
    with pytest.raises(ct.SpecError) as caught:
        check(*arguments)
    assert arguments[0] in caught.value.what
    assert fix in caught.value.fix


def test_the_minimum_can_be_raised():
    checks.require_count("Adaptive", "window", 2, minimum=2)
    with pytest.raises(ct.SpecError, match="an int of 2 or more"):
        checks.require_count("Adaptive", "window", 1, minimum=2)
    with pytest.raises(ct.SpecError):
        checks.require_steps("AtSteps", (), minimum=1)
