# SPDX-License-Identifier: Apache-2.0
"""Actions: what exists is valid, immutable and compares by value."""

import dataclasses
import pickle

import jax
import pytest

import remattools as rt
from remattools.rules.rule import coerce_action


@pytest.mark.parametrize(
    "make",
    [
        lambda: rt.Remat(every_n=0),
        lambda: rt.Remat(every_n=True),
        lambda: rt.Remat(every_n=2, offset=2),
        lambda: rt.Remat(group=0),
        lambda: rt.Remat(group="all"),
        lambda: rt.Remat(save="attn"),
        lambda: rt.Remat(save=(3,)),
        lambda: rt.Remat(save=("a",), offload=("a",)),
        lambda: rt.Remat(methods=()),
        lambda: rt.Remat(methods=("not a name",)),
        lambda: rt.Remat(prevent_cse=1),
    ],
)
def test_an_invalid_action_raises(make):
    with pytest.raises(rt.RuleError) as caught:
        make()
    assert caught.value.why
    assert caught.value.fix


def test_actions_are_frozen_and_hashable():
    action = rt.Remat(policy="dots_saveable", save=["a"])
    assert action == rt.Remat(policy="checkpoint_dots", save=("a",))
    assert len({action, rt.Remat(policy="dots_saveable", save=("a",))}) == 1
    with pytest.raises(AttributeError):
        action.every_n = 3


@pytest.mark.parametrize(
    "policy",
    ["dots_saveable", rt.policies.dots_saveable, jax.checkpoint_policies.dots_saveable],
    ids=["name", "policy", "callable"],
)
def test_a_policy_can_be_given_in_any_form(policy):
    assert rt.Remat(policy).policy == rt.policies.dots_saveable
    assert coerce_action(policy) == rt.Remat("dots_saveable") != rt.Remat()


def test_a_copy_with_changes_is_checked_too():
    action = rt.Remat("dots_saveable", save=("attn",), every_n=2, offset=1)
    assert dataclasses.replace(action, every_n=3) == rt.Remat("dots_saveable", save=("attn",), every_n=3, offset=1)
    assert pickle.loads(pickle.dumps(action)) == action
    with pytest.raises(rt.RuleError, match="offset=1 lies outside"):
        dataclasses.replace(action, every_n=1)


def test_only_what_differs_from_the_default_is_shown():
    assert repr(rt.Remat()) == "Remat()"
    assert repr(rt.Remat("dots_saveable", group="sqrt")) == "Remat(policy='dots_saveable', group='sqrt')"


@pytest.mark.parametrize(
    "options", [{"nested": True}, {"nested": 1, "group": 2}, {"nested": True, "group": 1}], ids=["alone", "int", "one"]
)
def test_nested_needs_a_group(options):
    with pytest.raises(rt.RuleError) as caught:
        rt.Remat(**options)
    assert "nested=True" in caught.value.fix
    assert rt.Remat(group=2, nested=True).nested is True  # control
