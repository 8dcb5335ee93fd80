# SPDX-License-Identifier: Apache-2.0
"""k consecutive modules in one region: fewer saved boundaries, the same mathematics."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import remattools as rt
from remattools.jaxpr import jaxprs
from remattools.transform.group import find_balanced_size
from tests.remattools.exactness import assert_exact
from tests.remattools.models import MLP, Block, Tower, inputs, loss


def regions(model, x):
    """Number of rematerialised regions in the traced gradient's forward program."""
    graphdef, state = nnx.split(model)
    program = jax.make_jaxpr(lambda s, x: loss(nnx.merge(graphdef, s, copy=True), x))(state, x)
    return sum(map(jaxprs.is_region, program.eqns))


class Between(Tower):
    """Code between the blocks, and hidden states collected from all of them."""

    def __call__(self, x):
        hidden = []
        for layer in self.layers:
            x = jnp.tanh(layer(x)) * 2
            hidden.append(x)
        return self.head(x), hidden


class Handing(nnx.Module):
    def __init__(self, width, rngs):
        self.proj = nnx.Linear(width, width, rngs=rngs)

    def __call__(self, x, cache):
        cache["k"] = cache.get("k", 0) + self.proj(x)
        return x + jnp.sin(cache["k"]), cache


class Caches(Tower):
    def __call__(self, x):
        cache = {}
        for layer in self.layers:
            x, cache = layer(x, cache)
        return self.head(x), cache


class Noisy(nnx.Module):
    def __init__(self, width, rngs):
        self.proj = nnx.Linear(width, width, rngs=rngs)
        self.norm = nnx.BatchNorm(width, rngs=rngs)
        self.dropout = nnx.Dropout(0.4, rngs=rngs)

    def __call__(self, x):
        return x + self.dropout(self.norm(jnp.sin(self.proj(x))))


MODELS = {
    "plain": lambda: Tower(depth=7),
    "code-between": lambda: Between(depth=7),
    "caches": lambda: Caches(depth=7, block=Handing),
    "state": lambda: Tower(depth=7, block=Noisy),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("group", "expected"), [(2, 4), (3, 3), (7, 1), (9, 1), ("sqrt", 3)])
def test_groups_are_exact_and_as_many_as_depth_over_k(name, group, expected):
    make, x = MODELS[name], inputs()
    rules = {"layers.*": rt.Remat(group=group)}
    assert regions(rt.apply(make(), rules), x) == expected
    if group == 3:  # one size is enough for the slow part
        assert_exact(loss, make(), rt.apply(make(), rules), x)


def test_a_module_taken_out_splits_a_group():
    model = rt.apply(Tower(depth=6), {"layers.*": rt.Remat(group=4), "layers.2": False})
    assert regions(model, inputs()) == 2
    actions = {row.path: row.action for row in rt.explain(model).rows}
    assert actions["layers.2"] is None
    assert actions["layers.1"] == rt.Remat(group=4)
    assert_exact(loss, Tower(depth=6), model, inputs())


def test_names_are_relative_to_each_module_of_a_group():
    x = inputs()
    rules = {"layers.*": rt.Remat(save=("attention.qkv", "mlp.up:dot_general"), group=2)}
    assert_exact(loss, Tower(depth=4), rt.apply(Tower(depth=4), rules), x)
    with pytest.raises(rt.UnmatchedRuleError) as caught:
        jax.grad(lambda x: loss(rt.apply(Tower(depth=4), {"layers.*": rt.Remat(save=("atention",), group=2)}), x))(x)
    assert "attention" in caught.value.fix


def test_grouped_models_are_reverted_and_regrouped():
    model = Tower(depth=4)
    before = nnx.graphdef(model)
    rt.apply(model, {"layers.*": rt.Remat(group=2)})
    assert [row.path for row in rt.explain(model).regions] == [f"layers.{i}" for i in range(4)]
    rt.apply(model, {"layers.*": "nothing_saveable"})
    assert regions(model, inputs()) == 4
    rt.apply(model, {"layers.*": rt.Remat(group=4)})
    assert regions(model, inputs()) == 1
    rt.revert(model)
    assert nnx.graphdef(model) == before


def test_a_group_next_to_a_region_of_its_container():
    rules = {".": "dots_saveable", "layers.*": rt.Remat(group=2)}
    assert_exact(loss, Tower(depth=4), rt.apply(Tower(depth=4), rules), inputs())


class Stacked(nnx.Module):
    """Layers stacked by vmap and run by scan; collects what each layer gives."""

    reverse = False

    def __init__(self, depth=7, width=8):
        self.layers = nnx.vmap(lambda rngs: Block(width, rngs), in_axes=0, out_axes=0)(nnx.Rngs(0).split(depth))

    def __call__(self, x):
        def step(x, layer):
            x = layer(x)
            return x, x.mean(axis=-1)

        scan = nnx.scan(step, in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0), reverse=self.reverse)
        return scan(x, self.layers)


class Reversed(Stacked):
    reverse = True


def _saved_carries(model, x):
    """Largest leading dimension among arrays of the carry's shape that live from forward to backward."""
    graphdef, state = nnx.split(model)
    program = jax.make_jaxpr(lambda x: jax.vjp(lambda x: loss(nnx.merge(graphdef, state, copy=True), x), x)[1])(x)
    shapes = [var.aval.shape for var in program.outvars if hasattr(var, "aval")]
    return max((shape[0] for shape in shapes if shape[-3:] == x.shape and len(shape) > 3), default=0)


@pytest.mark.parametrize("cls", [Stacked, Reversed])
@pytest.mark.parametrize("group", [2, 3, 7, "sqrt"])
def test_a_scan_becomes_a_scan_over_checkpointed_scans(cls, group):
    ruled = rt.apply(cls(), {"layers": rt.Remat(group=group)})
    x = inputs()
    size = 3 if group == "sqrt" else group
    assert _saved_carries(ruled, x) <= 7 // size < _saved_carries(cls(), x)
    if group in (3, 7):
        assert_exact(loss, cls(), ruled, x)


def test_group_outside_of_a_sequence_says_so():
    model = rt.apply(Tower(), {"head": rt.Remat(group=2)})
    with pytest.raises(rt.RuleError) as caught:
        jax.grad(lambda x: loss(model, x))(inputs())
    assert "neither in a list of modules" in caught.value.what


NESTED = [
    pytest.param(lambda: Tower(depth=7), "layers.*", id="list"),
    pytest.param(lambda: Between(depth=7), "layers.*", id="code-between"),
    pytest.param(Stacked, "layers", id="scan"),
    pytest.param(Reversed, "layers", id="reversed-scan"),
]


@pytest.mark.parametrize(("make", "pattern"), NESTED)
@pytest.mark.parametrize("save", [(), ("attention.qkv",)], ids=["nothing", "a-name"])
def test_nested_groups_are_exact(make, pattern, save):
    rules = {pattern: rt.Remat(group=3, nested=True, save=save)}
    assert rt.Rules.from_toml(rt.Rules(rules).to_toml()) == rt.Rules(rules)
    assert_exact(loss, make(), rt.apply(make(), rules), inputs())


def _count_regions(jaxpr):
    equations = jaxprs.open_jaxpr(jaxpr).eqns
    inside = (below for equation in equations for _, below in jaxprs.find_subjaxprs(equation))
    return sum(map(jaxprs.is_region, equations)) + sum(map(_count_regions, inside))


@pytest.mark.parametrize(("make", "pattern"), NESTED)
def test_each_module_of_a_nested_group_is_a_region(make, pattern):
    counts = []
    for nested in (False, True):
        model = rt.apply(make(), {pattern: rt.Remat(group=3, nested=nested)})
        graphdef, state = nnx.split(model)
        program = jax.make_jaxpr(lambda s, x: loss(nnx.merge(graphdef, s, copy=True), x))(state, inputs())  # noqa: B023
        counts.append(_count_regions(program))
    assert counts[1] > counts[0]


class Deep(nnx.Module):
    """Many narrow layers with wide insides, in a scan."""

    def __init__(self):
        make = nnx.split_rngs(splits=16)(nnx.vmap(lambda rngs: MLP(32, rngs)))
        self.layers = make(nnx.Rngs(0))

    def __call__(self, x):
        return nnx.scan(lambda x, layer: x + layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.layers)


def _run_by_hand(model, x):
    """As a person writes `remat(scan(remat(layer)))`."""
    graphdef, state = nnx.split(model.layers)
    state = jax.tree.map(lambda leaf: leaf.reshape(4, 4, *leaf.shape[1:]), state)
    layer = jax.checkpoint(lambda x, s: (x + nnx.merge(graphdef, s)(x), None))
    block = jax.checkpoint(lambda x, s: (jax.lax.scan(layer, x, s)[0], None))
    return jax.lax.scan(block, x, state)[0]


def test_a_nested_group_takes_the_memory_of_nested_scans_by_hand():
    x = jax.random.normal(jax.random.key(0), (512, 32))

    def measure(fn, model):
        return rt.measure(fn, model, x, differentiate=True, target="cpu").temp_bytes

    by_hand = measure(lambda model, x: jnp.mean(_run_by_hand(model, x) ** 2), Deep())
    actions = {"nested": rt.Remat(group=4, nested=True), "grouped": rt.Remat(group=4), "single": rt.Remat()}
    found = {name: measure(loss, rt.apply(Deep(), {"layers": action})) for name, action in actions.items()}
    assert found["nested"] <= by_hand * 1.001
    assert found["nested"] < 0.8 * min(found["grouped"], found["single"])  # controls


@pytest.mark.parametrize(
    ("length", "size"), [(1, 1), (7, 3), (12, 3), (28, 4), (48, 6), (61, 8), (64, 8), (62, 8)], ids=str
)
def test_a_balanced_size_divides_the_loop_if_it_can(length, size):
    assert find_balanced_size(length) == size
