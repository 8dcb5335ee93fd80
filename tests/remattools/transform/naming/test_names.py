# SPDX-License-Identifier: Apache-2.0
"""Saving by names that nobody wrote into the model."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

import remattools as rt
from remattools.jaxpr import jaxprs
from tests.remattools.exactness import assert_exact, temp_bytes
from tests.remattools.models import One, Tower, inputs, loss


class Author(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(8, 24, rngs=rngs)
        self.down = nnx.Linear(24, 8, rngs=rngs)
        self.norm = nnx.LayerNorm(8, rngs=rngs)

    def __call__(self, x):
        h = checkpoint_name(jnp.sin(self.up(self.norm(x))), "mine")
        h = jnp.cos(h) @ jnp.ones((24, 24)) @ jnp.ones((24, 24))
        return self.norm(jnp.tanh(self.down(jnp.exp(-(h**2)))))


@pytest.mark.parametrize(
    ("save", "count"),
    [
        pytest.param((), 0, id="none"),
        pytest.param(("up",), 1, id="module"),
        pytest.param(("norm",), 2, id="both-calls"),
        pytest.param(("norm[1]",), 1, id="second-call"),
        pytest.param((".:dot_general",), 2, id="operations"),
        pytest.param((".:dot_general[1]",), 1, id="second-operation"),
        pytest.param(("up:dot_general", "@mine"), 2, id="user-name"),
        pytest.param(("*:dot_general",), 2, id="any-module"),
    ],
)
def test_what_is_named_is_saved(save, count):
    model = rt.apply(One(Author(nnx.Rngs(0))), {"block": rt.Remat(save=save)})
    graphdef, state = nnx.split(model)

    def forward(state, x):
        return jax.vjp(lambda s: nnx.merge(graphdef, s, copy=True)(x), state)

    # The forward part of a region is inlined; the values that a policy saves have our name there.
    program = jax.make_jaxpr(forward)(state, inputs())
    assert sum(jaxprs.get_checkpoint_name(equation) == "remattools:save" for equation in program.eqns) == count


def test_names_union_with_the_policy():
    x = inputs()
    rules = {"layers.*": rt.Remat(policy="dots_with_no_batch_dims_saveable", save=("attention:dot_general[0]",))}
    assert_exact(loss, Tower(), rt.apply(Tower(), rules), x)


def test_saving_more_needs_more_memory_and_fewer_operations():
    x = inputs(batch=16, seq=16)

    def flops(model):
        graphdef, state = nnx.split(model)
        gradient = jax.grad(lambda s, x: loss(nnx.merge(graphdef, s, copy=True), x))
        return jax.jit(gradient).lower(state, x).compile().cost_analysis()["flops"]

    nothing, some = (rt.apply(Tower(depth=4), {"layers.*": rt.Remat(save=save)}) for save in ((), ("**:dot_general",)))
    assert temp_bytes(loss, nothing, x) < temp_bytes(loss, some, x)
    assert flops(nothing) > flops(some)


def test_an_unknown_name_is_an_error_with_suggestions():
    model = rt.apply(Tower(), {"layers.*": rt.Remat(save=("attention.qvk",))})
    with pytest.raises(rt.UnmatchedRuleError) as caught:
        jax.grad(lambda x: loss(model, x))(inputs())
    assert "attention.qkv" in caught.value.fix


def test_all_unknown_names_are_in_one_error():
    model = rt.apply(Tower(), {"layers.*": rt.Remat(save=("attention.qvk", "attention:exp", "mpl.up:add", "mlp"))})
    with pytest.raises(rt.UnmatchedRuleError) as caught:
        jax.grad(lambda x: loss(model, x))(inputs())
    assert "'attention.qvk', 'mpl.up:add'" in caught.value.what
    assert "'mlp'" not in caught.value.what  # control: this one matches
    assert "'attention.qvk': did you mean 'attention.qkv'" in caught.value.fix
    assert "'mpl.up:add': did you mean 'mlp.up:add'" in caught.value.fix


def test_a_name_with_an_index_too_large_is_told_apart():
    model = rt.apply(Tower(), {"layers.*": rt.Remat(save=("attention:exp[7]",))})
    with pytest.raises(rt.UnmatchedRuleError) as caught:
        jax.grad(lambda x: loss(model, x))(inputs())
    assert "'attention:exp' without an index; the last of these is 'attention:exp[0]'" in caught.value.fix


def test_names_reach_into_jits_scans_and_branches():
    class Deep(nnx.Module):
        def __init__(self, rngs):
            self.proj = nnx.Linear(8, 8, rngs=rngs)

        def __call__(self, x):
            y = jax.jit(lambda x: jnp.sin(x) * 2, inline=False)(self.proj(x))
            y, _ = jax.lax.scan(lambda c, _: (jnp.cos(c) @ jnp.ones((8, 8)), None), y, None, length=3)
            return jax.lax.cond(y.sum() > 0, lambda y: jnp.tanh(y), lambda y: jnp.exp(-(y**2)), y)

    x = inputs()
    for name in (".:sin", ".:dot_general", ".:tanh"):
        plain, ruled = One(Deep(nnx.Rngs(0))), rt.apply(One(Deep(nnx.Rngs(0))), {"block": rt.Remat(save=(name,))})
        assert_exact(loss, plain, ruled, x)
    rows = rt.explain(ruled, names=True, args=(x,)).regions
    assert {".:sin", ".:dot_general", ".:tanh", "proj"} <= {value.label for value in rows[0].values}


def test_values_inside_custom_derivatives_are_listed_as_out_of_reach():
    @jax.custom_vjp
    def double(x):
        return jnp.sinh(x) * 2

    double.defvjp(lambda x: (double(x), x), lambda x, g: (g * 2 * jnp.cosh(x),))

    class Kernel(nnx.Module):
        def __init__(self, rngs):
            self.proj = nnx.Linear(8, 8, rngs=rngs)

        def __call__(self, x):
            return double(self.proj(x))

    model = One(Kernel(nnx.Rngs(0)))
    row = rt.explain(model, {"block": "nothing_saveable"}, names=True, args=(inputs(),)).regions[0]
    reach = {value.label: value.reachable for value in row.values}
    assert reach[".:sinh"] is False
    assert reach["proj"] is True
    rt.apply(model, {"block": rt.Remat(save=(".:sinh",))})
    with pytest.raises(rt.UnmatchedRuleError) as caught:
        jax.grad(lambda x: loss(model, x))(inputs())
    assert "custom derivative" in caught.value.what


def test_explain_lists_index_shape_dtype_and_bytes():
    explanation = rt.explain(Tower(), {"layers.0": "nothing_saveable"}, names=True, args=(inputs(),))
    values = {(value.label, value.index): value for value in explanation.regions[0].values}
    qkv = values["attention.qkv", 0]
    assert (qkv.avals[0].shape, qkv.avals[0].dtype, qkv.bytes) == ((4, 6, 24), jnp.float32, 4 * 6 * 24 * 4)
    assert ("norm", 1) in values
    text = str(explanation)
    assert "attention.qkv" in text
    assert "2304" in text


def test_offloading_keeps_the_values():
    x = inputs()
    ruled = rt.apply(Tower(), {"layers.*": rt.Remat(offload=("attention.qkv",), save=("mlp.up",))})
    assert_exact(loss, Tower(), ruled, x)
    graphdef, state = nnx.split(ruled)
    program = str(jax.make_jaxpr(jax.grad(lambda s, x: loss(nnx.merge(graphdef, s, copy=True), x)))(state, x))
    assert "device_put" in program
    assert "ost" in program  # the host's memory kind stands in the program


def test_blocks_with_names_share_one_trace_too():
    traced = []

    class Counting(nnx.Module):
        def __init__(self, width, rngs):
            self.proj = nnx.Linear(width, width, rngs=rngs)

        def __call__(self, x):
            traced.append(1)
            return jnp.sin(self.proj(x))

    model = rt.apply(Tower(depth=5, block=Counting), {"layers.*": rt.Remat(save=("proj",))})
    jax.make_jaxpr(jax.grad(lambda x: loss(model, x)))(inputs())
    assert len(traced) == 1


@pytest.mark.parametrize("holder", [rt.Remat(save=("fc1:sin",)), rt.Remat(save=("**:sin",), group=2)])
def test_a_name_inside_an_inner_region_says_where_it_belongs(holder):
    class Inner(nnx.Module):
        def __init__(self, rngs):
            self.linear = nnx.Linear(8, 8, rngs=rngs)

        def __call__(self, x):
            return jnp.sin(jnp.sin(self.linear(x)))

    class Outer(nnx.Module):
        def __init__(self, width, rngs):
            self.fc1 = Inner(rngs)

        def __call__(self, x):
            return self.fc1(x)

    model = rt.apply(Tower(block=Outer), {"layers.*": holder, "fc1": "nothing_saveable"})
    with pytest.raises(rt.UnmatchedRuleError) as caught:
        nnx.grad(loss)(model, inputs())
    assert "inside another region (fc1:sin)" in caught.value.what
