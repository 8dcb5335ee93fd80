# SPDX-License-Identifier: Apache-2.0
"""The model of a call, the rules a candidate stands for, and the model under them."""

import jax.numpy as jnp
import pytest
from flax import nnx

import remattools as rt
from remattools.analysis.ruled_call import find_model, is_bare_action, make_rules, use_rules
from tests.remattools.models import Tower, inputs, loss


def test_the_model_is_found_in_arguments_and_closures():
    model, x = nnx.eval_shape(Tower), inputs()
    assert find_model(loss, (model, x)) is model
    assert find_model(lambda x: loss(model, x), (x,)) is model
    with pytest.raises(rt.MeasureError, match="no nnx model was found"):
        find_model(jnp.sum, (x,))


@pytest.mark.parametrize(
    ("candidate", "is_bare"),
    [
        pytest.param("nothing_saveable", True, id="policy name"),
        pytest.param(rt.policies.dots_saveable, True, id="policy"),
        pytest.param(rt.Remat(), True, id="Remat"),
        pytest.param("rules.toml", False, id="rule file"),
        pytest.param({"layers.*": "nothing_saveable"}, False, id="mapping"),
        pytest.param(rt.Rules({"layers.*": "nothing_saveable"}), False, id="Rules"),
    ],
)
def test_an_action_without_a_pattern_is_recognised(candidate, is_bare):
    assert is_bare_action(candidate) is is_bare


def test_a_bare_action_applies_to_every_block():
    rules = make_rules(nnx.eval_shape(Tower), "nothing_saveable")
    assert [pattern.text for pattern, _ in rules] == ["layers.*"]
    with pytest.raises(rt.MeasureError, match="does not say which modules") as caught:
        make_rules(nnx.Linear(8, 8, rngs=nnx.Rngs(0)), "nothing_saveable")
    assert "pattern" in caught.value.fix


def test_rules_are_applied_for_the_block_only():
    model = nnx.eval_shape(Tower)
    before = nnx.graphdef(model)
    with use_rules(model, rt.Rules({"layers.*": "nothing_saveable"})):
        assert nnx.graphdef(model) != before
    assert nnx.graphdef(model) == before
    with use_rules(model, None):
        assert nnx.graphdef(model) == before
