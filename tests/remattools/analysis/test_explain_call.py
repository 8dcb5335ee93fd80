# SPDX-License-Identifier: Apache-2.0
"""`explain` looks at any call of a model: by a loss, by a method, by keywords."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import remattools as rt
from tests.remattools.models import MLP, Tower, loss

RULES = {"layers.*": "nothing_saveable"}
X = jax.ShapeDtypeStruct((4, 6, 8), jnp.float32)


class ByMethod(nnx.Module):
    def __init__(self):
        self.layers = nnx.List([MLP(8, nnx.Rngs(i)) for i in range(2)])

    def log_prob(self, x):
        for layer in self.layers:
            x = layer(x)
        return x.sum()


class ByKeyword(ByMethod):
    def __call__(self, *, image):
        return self.log_prob(image)


def _get_labels(explanation):
    return [value.label for value in explanation.regions[0].values]


def test_a_loss_and_its_model_have_the_same_names():
    model = nnx.eval_shape(Tower)
    expected = rt.explain(model, RULES, names=True, args=(X,))
    assert "attention.qkv" in _get_labels(expected)
    assert rt.explain(loss, model, X, rules=RULES, names=True) == expected
    assert rt.explain(loss, RULES, names=True, args=(model, X)) == expected
    assert rt.explain(nnx.jit(loss), model, X, rules=RULES, names=True) == expected
    assert rt.explain(lambda x: loss(model, x), X, rules=RULES, names=True) == expected


def test_methods_and_keywords_are_followed():
    expected = _get_labels(rt.explain(ByKeyword(), RULES, names=True, kwargs={"image": X}))
    assert "up" in expected
    for fn, *args in ((ByMethod.log_prob, ByMethod(), X), (ByMethod().log_prob, X)):
        assert _get_labels(rt.explain(fn, *args, rules=RULES, names=True)) == expected


def test_operations_of_the_loss_are_in_no_region():
    model = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    x = jnp.ones((8, 2))
    around = rt.explain(lambda m, x: jnp.sin(m(jnp.cos(x))).sum(), model, x, rules={".": "dots_saveable"}, names=True)
    alone = rt.explain(model, {".": "dots_saveable"}, names=True, args=(x,))
    assert _get_labels(around) == _get_labels(alone)
    assert ".:dot_general" in _get_labels(alone)


def test_without_a_call_only_modules_are_looked_at():
    assert str(rt.explain(ByMethod(), RULES)) == str(rt.explain(ByMethod(), rules=RULES))
    assert not rt.explain(ByMethod(), RULES).regions[0].values


def test_the_trace_changes_no_state():
    model = nnx.Dropout(0.5, rngs=nnx.Rngs(0))
    rt.explain(lambda m, x: m(x).sum(), model, jnp.ones(3), rules={".": "nothing_saveable"}, names=True)
    assert model.rngs.count[...] == 0


@pytest.mark.parametrize(
    ("call", "what", "fix"),
    [
        pytest.param(
            lambda: rt.explain(ByMethod(), RULES, names=True, args=(X,)),
            "ByMethod has no __call__",
            "explain(ByMethod.log_prob, model, x",
            id="another method",
        ),
        pytest.param(
            lambda: rt.explain(ByKeyword(), RULES, names=True, args=(X,)),
            "cannot be called with 1 arguments",
            'kwargs={"image": ...}',
            id="keywords",
        ),
        pytest.param(
            lambda: rt.explain(Tower(), RULES, names=True, args=()), "cannot be called", "args=", id="too few"
        ),
        pytest.param(lambda: rt.explain(loss, X, rules=RULES), "no nnx model", "pass the model", id="no model"),
        pytest.param(
            lambda: rt.explain(nnx.grad(loss), Tower(), jnp.ones((4, 6, 8)), rules=RULES),
            "computes a gradient",
            "pass the loss",
            id="a gradient",
        ),
    ],
)
def test_a_call_that_does_not_work_says_how_to_enter_the_model(call, what, fix):
    with pytest.raises(rt.MeasureError) as caught:
        call()
    assert what in caught.value.what
    assert fix in caught.value.fix


def test_two_sets_of_rules_are_refused():
    with pytest.raises(rt.RuleError, match="2 sets of rules"):
        rt.explain(Tower(), RULES, rules=RULES)
