# SPDX-License-Identifier: Apache-2.0
"""The policy algebra does what it says, and lowers to JAX's own objects."""

import itertools

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.ad_checkpoint import checkpoint_name

import remattools as rt
from remattools.rules import policies
from remattools.rules.policies import parse_policy, resolve
from remattools.rules.policy_types import Decision


def function(x):
    y = checkpoint_name(jnp.sin(x @ x), "first")
    z = checkpoint_name(jnp.cos(y @ y), "second")
    return jnp.tanh(jnp.einsum("bij,bjk->bik", z[None], z[None])).sum()


EQUATIONS = jax.make_jaxpr(function)(jnp.ones((3, 3))).eqns

LEAVES = [
    policies.everything_saveable,
    policies.nothing_saveable,
    policies.dots_saveable,
    policies.dots_with_no_batch_dims_saveable,
    policies.offload_dot_with_no_batch_dims("device", "pinned_host"),
    policies.save_only_these_names("first"),
    policies.save_any_names_but_these("first"),
    policies.save_anything_except_these_names("second"),
    policies.save_and_offload_only_these_names(
        names_which_can_be_saved=["first"], names_which_can_be_offloaded=["second"]
    ),
]
trees = st.recursive(
    st.sampled_from(LEAVES),
    lambda inner: st.one_of(
        st.tuples(inner, inner).map(lambda p: p[0] | p[1]),
        st.tuples(inner, inner).map(lambda p: p[0] & p[1]),
        inner.map(lambda p: ~p),
    ),
    max_leaves=5,
)


def verdicts(policy):
    return [policy.decide(e.primitive, *(v.aval for v in e.invars), **e.params) for e in EQUATIONS]


def test_all_of_jaxs_names_are_there():
    # Some releases list their classes beside the functions.
    assert set(policies.names()) == {name for name in vars(jax.checkpoint_policies) if name.islower()}


@pytest.mark.parametrize(
    "name",
    ["everything_saveable", "nothing_saveable", "dots_saveable", "checkpoint_dots", "dots_with_no_batch_dims_saveable"],
)
def test_named_policies_are_jaxs_own_objects(name):
    assert resolve(name).lower() is getattr(jax.checkpoint_policies, name)
    assert resolve(getattr(jax.checkpoint_policies, name)) == resolve(name)


@given(trees, trees)
def test_the_algebra(a, b):
    for both, either, one, other, inverse in zip(
        verdicts(a & b), verdicts(a | b), verdicts(a), verdicts(b), verdicts(~a), strict=True
    ):
        assert both == min(one, other)
        assert either == max(one, other)
        assert (inverse is Decision.RECOMPUTE) == (one is not Decision.RECOMPUTE)


@given(trees)
def test_text_round_trip_and_equal_lowering(policy):
    again = parse_policy(str(policy))
    assert again == policy
    assert hash(again) == hash(policy)
    assert again.lower() == policy.lower()
    assert hash(again.lower()) == hash(policy.lower())


def test_jaxs_broken_combinators_are_replaced():
    policy = policies.save_anything_except_these_names("first")
    named = [e.params.get("name") for e in EQUATIONS]
    assert [v is Decision.RECOMPUTE for v in verdicts(policy)] == [name == "first" for name in named]
    # Control: JAX's own of that name keeps the named value too.
    broken = jax.checkpoint_policies.save_anything_except_these_names("first")
    assert all(broken(e.primitive, *(v.aval for v in e.invars), **e.params) for e in EQUATIONS)
    offload = policies.save_from_both_policies("dots_saveable", policies.offload_dot_with_no_batch_dims())
    assert Decision.SAVE in verdicts(offload)


@pytest.mark.parametrize("policy", LEAVES, ids=str)
def test_lowered_policies_run_under_jax(policy):
    x = jnp.eye(3) + 0.1
    plain = jax.jit(jax.grad(function))(x)
    ruled = jax.jit(jax.grad(jax.checkpoint(function, policy=policy.lower())))(x)
    assert jnp.allclose(plain, ruled, rtol=1e-5)


@pytest.mark.parametrize(
    ("value", "part"),
    [
        ("dots_savable", "dots_saveable"),
        ("save_only_these_names", "save_only_these_names(...)"),
        (jax.checkpoint_policies.save_only_these_names, "save_only_these_names(...)"),
        ("__import__('os')", ""),
        ("dots_saveable + nothing_saveable", "combined"),
        ("dots_saveable |", "combined"),
        ("save_only_these_names(3)", ""),
        (3, ""),
        ("save_and_offload_only_these_names(names_which_can_be_saved=['a'], names_which_can_be_offloaded=['a'])", ""),
    ],
)
def test_what_is_no_policy(value, part):
    with pytest.raises(rt.PolicyError) as caught:
        resolve(value)
    assert caught.value.why
    assert part in str(caught.value)


def test_bare_callables_compare_by_identity_and_have_no_text():
    def mine(prim, *_, **__):
        return prim.name == "sin"

    assert resolve(mine) == resolve(mine)
    assert resolve(mine).lower() is mine
    with pytest.raises(rt.RuleError) as caught:
        rt.Rules({"a": mine}).to_toml()
    assert "callable" in caught.value.what


def test_policies_are_distinct_values():
    for a, b in itertools.combinations(LEAVES, 2):
        assert a != b
