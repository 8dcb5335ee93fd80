# SPDX-License-Identifier: Apache-2.0
"""Programs in pieces: what is recorded, and what a loss leaves to the rules of its modules."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import remattools as rt
from remattools.transform import swap
from remattools.transform.naming import names
from remattools.transform.tiling import evaluate

from .sizes import find_largest

WIDTH, HIDDEN, VOCABULARY = 8, 64, 1024


class Model(nnx.Module):
    def __init__(self, rngs):
        self.up, self.down = nnx.Linear(WIDTH, HIDDEN, rngs=rngs), nnx.Linear(HIDDEN, WIDTH, rngs=rngs)
        self.head = nnx.Linear(WIDTH, VOCABULARY, rngs=rngs)

    def hide(self, x):
        return self.down(jnp.exp(jnp.sin(self.up(x))))

    def __call__(self, x):
        return self.head(x + self.hide(x))


def loss(model, x):
    return jax.nn.logsumexp(model(x), axis=-1).mean()


X = jax.ShapeDtypeStruct((32, WIDTH), jnp.float32)


def _record(fn, rules=None):
    model = nnx.eval_shape(lambda: Model(nnx.Rngs(0)))
    if rules is not None:
        rt.apply(model, rules)
    graphdef, state = nnx.split(model)
    with evaluate.record_tiles() as found:
        jax.eval_shape(lambda state, x: fn(nnx.merge(graphdef, state), x), state, X)
    return found


def _list_seeds(programs):
    return [
        (one.path, node.seed.aval.shape)
        for one in programs
        for node in one.program.nodes
        if isinstance(node, evaluate.Stretch)
    ]


def test_a_loss_cuts_what_reaches_out_of_its_modules():
    assert _list_seeds(_record(rt.tile(loss, pieces=4))) == [("@loss", (32, VOCABULARY))]


def test_a_rule_on_the_model_cuts_what_lies_inside():
    found = _list_seeds(_record(loss, {".": rt.Tile(4)}))
    assert found == []  # the model returns its largest value
    found = _list_seeds(_record(lambda model, x: model.hide(x).sum(), {".": rt.Remat(methods=["hide"]) & rt.Tile(4)}))
    assert found == [(".", (32, HIDDEN))]


def test_nothing_is_recorded_outside_of_the_block():
    with evaluate.record_tiles() as found:
        pass
    jax.eval_shape(rt.tile(lambda x: jnp.exp(x @ x.T).sum()), X)
    assert found == []


@pytest.mark.parametrize("rules", [{"@loss": rt.Tile(4)}, {".": "nothing_saveable", "@loss": rt.Tile(4)}])
def test_equal_results_with_and_without_a_region_around(rules):
    model, x = Model(nnx.Rngs(0)), jnp.sin(jnp.arange(32.0 * WIDTH)).reshape(32, WIDTH)
    expected = nnx.grad(loss)(model, x)
    tiled = rt.apply(loss, rules)
    if len(rules) > 1:
        rt.apply(model, rules)
    found = nnx.jit(nnx.grad(tiled))(model, x)
    for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        assert jnp.allclose(a, b, rtol=1e-4, atol=1e-6)


class Attention(nnx.Module):
    def __init__(self, rngs):
        self.q, self.k, self.v = (nnx.Linear(WIDTH, WIDTH, rngs=rngs) for _ in range(3))

    def __call__(self, x):
        return x + jax.nn.softmax(self.q(x) @ self.k(x).T) @ self.v(x)


class Block(nnx.Module):
    def __init__(self, rngs):
        self.attn = Attention(rngs)

    def __call__(self, x):
        return jnp.sin(self.attn(x))


class Tower(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([Block(rngs) for _ in range(4)])

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


REGIONS = {
    "nothing saved": {"layers.*": "nothing_saveable"},
    "products saved": {"layers.*": "dots_saveable"},
    "a name saved": {"layers.*": rt.Remat("dots_saveable", save=("attn",))},
    "groups": {"layers.*": rt.Remat("dots_saveable", group=2)},
}


def _measure_tower(rules):
    model = rt.apply(nnx.eval_shape(lambda: Tower(nnx.Rngs(0))), rules)
    graphdef, state = nnx.split(model)
    x = jax.ShapeDtypeStruct((64, WIDTH), jnp.float32)
    return find_largest(
        jax.make_jaxpr(jax.grad(lambda state, x: nnx.merge(graphdef, state)(x).sum()))(state, x),
    )


@pytest.mark.parametrize("regions", REGIONS.values(), ids=REGIONS)
def test_regions_around_pieces_do_not_bring_the_whole_value_back(regions):
    whole, piece = 64 * 64 * 4, 16 * 64 * 4
    assert _measure_tower(regions) == whole
    assert _measure_tower({**regions, "layers.*.attn": rt.Tile(4)}) == piece


def test_control_a_policy_that_sees_into_pieces_does(monkeypatch):
    monkeypatch.setattr(names, "is_policy_by_names", lambda action, holds_tiles=False: False)
    assert _measure_tower({"layers.*": "dots_saveable", "layers.*.attn": rt.Tile(4)}) == 64 * 64 * 4


def test_leaving_a_block_of_rules_takes_the_tiles_out_again():
    model = nnx.eval_shape(lambda: Tower(nnx.Rngs(0)))
    with rt.applied(model, {"layers.*": "nothing_saveable", "layers.*.attn": rt.Tile(4)}):
        assert swap.has_tiles_inside(model.layers[0])
    assert not swap.has_tiles_inside(model.layers[0])
    assert type(model.layers[0]) is Block
