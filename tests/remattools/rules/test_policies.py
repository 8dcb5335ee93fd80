# SPDX-License-Identifier: Apache-2.0
"""Policies by name, as expressions and as JAX's own objects."""

import jax
import pytest
from hypothesis import given

import remattools as rt
from remattools import compat
from remattools.rules import policies
from remattools.rules.policies import parse_policy, resolve
from remattools.rules.policy_types import DROPOUT_MASK, Decision
from tests.remattools.rules.sample_policies import EQUATIONS, decide_all, trees


def test_all_of_jaxs_names_are_there():
    # Some releases list their classes next to the functions.
    ours = {"dropout_masks_saveable"}
    assert set(policies.names()) - ours == {name for name in vars(jax.checkpoint_policies) if name.islower()}


@pytest.mark.parametrize(
    "name",
    ["everything_saveable", "nothing_saveable", "dots_saveable", "checkpoint_dots", "dots_with_no_batch_dims_saveable"],
)
def test_named_policies_are_jaxs_own_objects(name):
    assert resolve(name).lower() is getattr(jax.checkpoint_policies, name)
    assert resolve(getattr(jax.checkpoint_policies, name)) == resolve(name)


def test_dropout_masks_are_saved_by_their_name_alone():
    masks = policies.dropout_masks_saveable
    assert masks.lower() == policies.save_only_these_names(DROPOUT_MASK).lower()
    assert set(decide_all(masks)) == {Decision.RECOMPUTE}
    assert masks.decide(compat.NAME_PRIMITIVE, name=DROPOUT_MASK) is Decision.SAVE


@pytest.mark.parametrize(
    ("policy", "has_masks"),
    [
        ("dropout_masks_saveable", True),
        ("dots_saveable | dropout_masks_saveable", True),
        ("everything_saveable & dropout_masks_saveable", True),
        ("~dropout_masks_saveable", True),
        ("dots_saveable | nothing_saveable", False),
        ("save_only_these_names('a')", False),
    ],
)
def test_a_combination_knows_whether_it_decides_on_masks(policy, has_masks):
    assert resolve(policy).has_dropout_masks is has_masks


@given(trees)
def test_text_round_trip_and_equal_lowering(policy):
    parsed = parse_policy(str(policy))
    assert parsed == policy
    assert hash(parsed) == hash(policy)
    assert parsed.lower() == policy.lower()
    assert hash(parsed.lower()) == hash(policy.lower())


def test_jaxs_broken_combinators_are_replaced():
    policy = policies.save_anything_except_these_names("first")
    named = [e.params.get("name") for e in EQUATIONS]
    assert [v is Decision.RECOMPUTE for v in decide_all(policy)] == [name == "first" for name in named]
    # Control: JAX's own policy of that name saves the named value too.
    broken = jax.checkpoint_policies.save_anything_except_these_names("first")
    assert all(broken(e.primitive, *(v.aval for v in e.invars), **e.params) for e in EQUATIONS)
    offload = policies.save_from_both_policies("dots_saveable", policies.offload_dot_with_no_batch_dims())
    assert Decision.SAVE in decide_all(offload)


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
def test_a_value_that_is_not_a_policy_raises(value, part):
    with pytest.raises(rt.PolicyError) as caught:
        resolve(value)
    assert caught.value.why
    assert part in str(caught.value)


def test_callables_compare_by_identity_and_cannot_be_written():
    def mine(prim, *_, **__):
        return prim.name == "sin"

    assert resolve(mine) == resolve(mine)
    assert resolve(mine).lower() is mine
    with pytest.raises(rt.RuleError) as caught:
        rt.Rules({"a": mine}).to_toml()
    assert "callable" in caught.value.what
