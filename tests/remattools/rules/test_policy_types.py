# SPDX-License-Identifier: Apache-2.0
"""The policy algebra does what it says, and its results run under `jax.checkpoint`."""

import itertools

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given

from remattools.rules import policies
from remattools.rules.policy_types import Decision
from tests.remattools.rules.sample_policies import LEAVES, decide_all, function, trees


@given(trees, trees)
def test_combined_policies_decide_by_their_parts(a, b):
    for both, either, one, other, inverse in zip(
        decide_all(a & b), decide_all(a | b), decide_all(a), decide_all(b), decide_all(~a), strict=True
    ):
        assert both == min(one, other)
        assert either == max(one, other)
        assert (inverse is Decision.RECOMPUTE) == (one is not Decision.RECOMPUTE)


@pytest.mark.parametrize("policy", LEAVES, ids=str)
def test_lowered_policies_run_under_jax(policy):
    x = jnp.eye(3) + 0.1
    plain = jax.jit(jax.grad(function))(x)
    ruled = jax.jit(jax.grad(jax.checkpoint(function, policy=policy.lower())))(x)
    assert jnp.allclose(plain, ruled, rtol=1e-5)


def test_policies_are_distinct_values():
    for a, b in itertools.combinations(LEAVES, 2):
        assert a != b


def test_remat3_ignores_only_what_is_not_one_of_jaxs_policies():
    ignored = [policy for policy in LEAVES if policy.is_lowered_to_names]
    assert ignored == [policies.save_anything_except_these_names("second")]
    assert (~policies.dots_saveable).is_lowered_to_names
