# SPDX-License-Identifier: Apache-2.0
"""Functions under an action: `tile` as a wrapper, a decorator and a rule for the loss."""

import inspect

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import remattools as rt
from remattools.transform.functions import FunctionTarget, get_function_action


def loss(w, x):
    """Compute a loss."""
    return jax.nn.logsumexp(x @ w, axis=-1).mean()


def test_it_keeps_name_docstring_and_signature():
    tiled = rt.tile(loss, pieces=4)
    assert (tiled.__name__, tiled.__doc__) == (loss.__name__, loss.__doc__)
    assert inspect.signature(tiled) == inspect.signature(loss)


def test_wrapper_decorator_and_rule_are_the_same_action():
    rules = rt.Rules({"layers.*": "nothing_saveable", "@loss": rt.Tile(4)})
    actions = [
        get_function_action(fn) for fn in (rt.tile(loss, pieces=4), rt.tile(pieces=4)(loss), rt.apply(loss, rules))
    ]
    assert actions == [rt.Remat("everything_saveable", tile=rt.Tile(4))] * 3


def test_the_last_action_replaces_the_others_and_revert_takes_it_back():
    tiled = rt.apply(rt.tile(loss, pieces=4), {"@loss": rt.Tile(2)})
    assert get_function_action(tiled).tile == rt.Tile(2)
    assert rt.revert(tiled) is loss
    assert rt.apply(tiled, {"@loss": False}) is loss


def test_a_loss_can_be_one_region():
    regions = rt.apply(loss, {"@loss": "nothing_saveable"})
    jaxpr = jax.make_jaxpr(jax.grad(regions))(jnp.ones((4, 8)), jnp.ones((2, 4)))
    assert "remat" in str(jaxpr)


def test_rules_for_the_loss_alone_are_refused_on_a_model():
    with pytest.raises(rt.RuleError, match="all rules are for '@loss'"):
        rt.apply(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), {"@loss": rt.Tile()})


def test_other_rules_of_a_file_with_a_loss_apply_to_the_model():
    model = rt.apply(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), {".": "nothing_saveable", "@loss": rt.Tile()})
    assert [row.path for row in rt.explain(model).regions] == ["."]


@pytest.mark.parametrize("target", [3, nnx.Linear])
def test_what_is_not_a_function_is_refused(target):
    with pytest.raises(rt.RuleError, match="is not a function"):
        rt.tile(target)


def test_without_a_transform_the_plain_function_runs():
    seen = []

    @rt.tile
    def f(x):
        seen.append(type(x))
        return jnp.exp(x).sum()

    f(jnp.ones(64))
    assert not issubclass(seen[0], jax.core.Tracer)


def test_two_targets_of_one_function_are_equal():
    assert FunctionTarget(len) == FunctionTarget(len)
    assert hash(FunctionTarget(len)) == hash(FunctionTarget(len))
    assert FunctionTarget(len) != FunctionTarget(abs)
    assert FunctionTarget(max)(1, 2) == 2
