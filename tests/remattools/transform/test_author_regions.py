# SPDX-License-Identifier: Apache-2.0
"""Regions in a model's own code are found, located and named as the cause."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

import remattools as rt

WIDTH, LAYERS = 8, 3
X = jnp.ones((16, WIDTH))


class Block(nnx.Module):
    def __init__(self, rngs):
        self.up, self.down = nnx.Linear(WIDTH, 4 * WIDTH, rngs=rngs), nnx.Linear(4 * WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x):
        return x + self.down(checkpoint_name(jnp.sin(jnp.cos(self.up(x))), "mine"))


class Stack(nnx.Module):
    """Layers in a scan that perhaps rematerialises them, like MaxText's decoder."""

    def __init__(self, has_remat=True):
        self.has_remat = has_remat
        self.layers = nnx.split_rngs(splits=LAYERS)(nnx.vmap(lambda rngs: Block(rngs)))(nnx.Rngs(0))

    def __call__(self, x):
        graphdef, params = nnx.split(self.layers)

        def run_layer(x, params):
            return nnx.merge(graphdef, params)(x), None

        if self.has_remat:
            run_layer = jax.checkpoint(run_layer, policy=jax.checkpoint_policies.dots_saveable)
        return jax.lax.scan(run_layer, x, params)[0]


class Row(nnx.Module):
    """Layers in a list; each runs under `nnx.remat`."""

    def __init__(self, has_remat=True):
        self.has_remat = has_remat
        self.layers = nnx.List([Block(nnx.Rngs(i)) for i in range(LAYERS)])

    def __call__(self, x):
        def run_layer(layer, x):
            return layer(x)

        for layer in self.layers:
            x = (nnx.remat(run_layer) if self.has_remat else run_layer)(layer, x)
        return x


class Inner(nnx.Module):
    """A block whose own checkpoint is inside it."""

    def __init__(self, has_remat=True):
        self.has_remat = has_remat
        self.layers = nnx.List([nnx.Dict(block=Block(nnx.Rngs(0)))])
        self.first = nnx.Linear(WIDTH, WIDTH, rngs=nnx.Rngs(1))

    def __call__(self, x):
        def run_layer(x):
            return self.layers[0].block(x)

        return (jax.checkpoint(run_layer) if self.has_remat else run_layer)(jnp.sin(self.first(x)))


def _loss(model, x):
    return jnp.mean(model(x) ** 2)


MODELS = [pytest.param(Stack, "layers", "dots_saveable", id="scan"), pytest.param(Row, "layers.*", "", id="nnx.remat")]


@pytest.mark.parametrize(("make", "path", "policy"), MODELS)
@pytest.mark.parametrize("has_remat", [True, False], ids=["remat", "control"])
def test_explain_names_the_models_own_checkpoint(make, path, policy, has_remat):
    explanation = rt.explain(_loss, make(has_remat), X, rules={path: "nothing_saveable"}, names=True)
    text = str(explanation)
    assert ("the model's own jax.checkpoint" in text) is has_remat
    assert ("run_layer at" in text and pathlib.Path(__file__).name in text) is has_remat
    assert not has_remat or policy in text
    assert "is not called" not in text
    row = explanation.regions[0]
    assert bool(row.author_regions) is has_remat
    # Its names are listed all the same: a rule can use them.
    assert {"@mine", "up", ".:sin", ".:input"} <= {value.label for value in row.values if value.reachable}


@pytest.mark.parametrize(("make", "path", "policy"), MODELS)
@pytest.mark.parametrize("has_remat", [True, False], ids=["remat", "control"])
def test_check_reports_it_instead_of_advice_that_cannot_help(make, path, policy, has_remat):
    del policy
    report = rt.check(_loss, make(has_remat), X, rules={path: "nothing_saveable"}, target="cpu")
    codes = {finding.code for finding in report.findings}
    assert ("author_region" in codes) is has_remat, str(report)
    assert "nothing_freed" not in codes


def test_a_checkpoint_inside_a_region_is_named_and_its_names_are_out_of_reach():
    texts = []
    for has_remat in (True, False):
        explanation = rt.explain(_loss, Inner(has_remat), X, rules={".": "nothing_saveable"}, names=True)
        reach = {value.label: value.reachable for value in explanation.regions[0].values}
        assert reach["first"] is True
        assert reach["@mine"] is not has_remat
        texts.append(str(explanation))
    assert "holds the model's own jax.checkpoint" in texts[0]
    assert "jax.checkpoint" not in texts[1]


def test_rules_of_the_library_are_not_the_models_own():
    model = rt.apply(Row(has_remat=False), {"layers.*": "nothing_saveable"})
    assert "jax.checkpoint" not in str(rt.explain(_loss, model, X))


@pytest.mark.skipif(
    bool(getattr(jax.config, "jax_remat3", False)),
    reason="the programs of jax_remat3's regions cannot be replaced; the marks change names in explanations only",
)
@pytest.mark.parametrize("make", [Stack, Row])
def test_marks_do_not_stay_inside_the_models_own_regions(make):
    report = rt.residuals(functools.partial(_loss), make(), X)
    assert not any("rt-" in row.name for row in report.rows)
