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
from tests.remattools.models import Tower, inputs, loss


class One(nnx.Module):
    """One block, so that what is kept can be read off."""

    def __init__(self, block):
        self.block = block

    def __call__(self, x):
        return self.block(x).sum()


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

    # The part of a region that runs forward is inlined; what a policy keeps of it stands there under our name.
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


class Activated(nnx.Module):
    """A product between two operations whose derivatives read their own results."""

    def __init__(self, activation):
        self.activation = activation
        self.weight = nnx.Param(jax.random.normal(jax.random.key(0), (8, 8)))

    def __call__(self, x):
        return jnp.sin(self.activation(jnp.abs(x @ self.weight[...]) + 0.1))


class Applied(nnx.Module):
    """A module that is one operation, so that its output is that operation's result."""

    def __call__(self, x):
        return jnp.exp(x)


OWN_RESULT = {
    "exp": ("exp", jnp.exp, (".:exp",)),
    "tanh": ("tanh", jnp.tanh, (".:tanh",)),
    "logistic": ("logistic", jax.nn.sigmoid, (".:logistic",)),
    "sqrt": ("sqrt", jnp.sqrt, (".:sqrt",)),
    "rsqrt": ("rsqrt", jax.lax.rsqrt, (".:rsqrt",)),
    "in-a-jit": ("tanh", jax.jit(jnp.tanh), (".:tanh",)),
    "in-a-scan": ("tanh", lambda x: jax.lax.scan(lambda c, row: (c, jnp.tanh(row)), 0.0, x)[1], (".:tanh",)),
    "user-name": ("exp", lambda x: checkpoint_name(jnp.exp(x), "mine"), ("@mine",)),
    "module": ("exp", Applied(), ("activation",)),
    "complex": ("exp", lambda x: jnp.abs(jnp.exp(1j * x) + x), (".:exp",)),
    "complex-of-others": ("sin", lambda x: jnp.abs(jnp.sin(x + 1j)), (".:sin[0]",)),
    "complex-user-name": ("exp", lambda x: jnp.abs(checkpoint_name(jnp.exp(1j * x), "mine") + x), ("@mine",)),
    "module-and-operation": ("exp", Applied(), ("activation", "activation:exp")),
}


def backward_primitives(model, x):
    """Names of what the gradient's region makes again and computes, in order."""
    graphdef, state = nnx.split(model)
    program = jax.make_jaxpr(jax.grad(lambda s: nnx.merge(graphdef, s, copy=True)(x)))(state)
    (region,) = [equation for equation in program.eqns if jaxprs.is_region(equation)]
    return [equation.primitive.name for _, inner in jaxprs.find_subjaxprs(region) for equation in all_equations(inner)]


def all_equations(program):
    for equation in jaxprs.open_jaxpr(program).eqns:
        yield equation
        for _, inner in jaxprs.find_subjaxprs(equation):
            yield from all_equations(inner)


@pytest.mark.parametrize(("primitive", "activation", "names"), OWN_RESULT.values(), ids=OWN_RESULT)
def test_a_kept_result_is_not_made_again_for_its_own_derivative(primitive, activation, names):
    x = inputs()
    model = rt.apply(One(Activated(activation)), {"block": rt.Remat(save=names)})
    assert primitive not in backward_primitives(model, x)
    nothing = rt.apply(One(Activated(activation)), {"block": rt.Remat()})
    assert primitive in backward_primitives(nothing, x)
    assert_exact(lambda m, x: m(x), One(Activated(activation)), model, x)


@pytest.mark.parametrize("axis_type", [jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit], ids=str)
def test_a_kept_result_on_a_mesh(axis_type):
    mesh = jax.make_mesh((1,), ("rows",), axis_types=(axis_type,))
    rows = jax.sharding.PartitionSpec("rows")
    x = jax.device_put(jnp.linspace(0.1, 1.0, 32).reshape(4, 8), jax.sharding.NamedSharding(mesh, rows))
    plain = One(Activated(jnp.sqrt))
    ruled = rt.apply(One(Activated(jnp.sqrt)), {"block": rt.Remat(save=(".:sqrt",))})
    gradients = []
    for model in (plain, ruled):
        over = jax.shard_map(lambda x, model=model: model(x)[None], mesh=mesh, in_specs=rows, out_specs=rows)
        with jax.set_mesh(mesh):
            gradients += [jax.jit(jax.grad(lambda x, call=call: call(x).sum()))(x) for call in (over, model)]
    for gradient in gradients[1:]:
        assert jnp.allclose(gradient, gradients[0], rtol=1e-5)


def test_a_result_that_is_a_constant():
    """The product over nothing is 1, whatever is given."""

    class Product(nnx.Module):
        def __call__(self, x):
            return jnp.sin(x) * jnp.prod(x)

    ruled = rt.apply(One(Product()), {"block": rt.Remat(save=("**:*",))})
    assert jax.jit(jax.grad(ruled))(jnp.zeros(0)).shape == (0,)
    assert jnp.allclose(jax.grad(ruled)(jnp.ones(3)), jax.grad(One(Product()))(jnp.ones(3)))


def test_a_result_that_is_made_with_others_is_kept_as_it_is():
    """The derivative of singular values makes them anew together with their vectors."""

    class Values(nnx.Module):
        def __call__(self, x):
            return jnp.linalg.svd(x, compute_uv=False)

    x = jnp.arange(6.0).reshape(2, 3)
    ruled = rt.apply(One(Values()), {"block": rt.Remat(save=("**:svd",))})
    assert jnp.allclose(jax.grad(ruled)(x), jax.grad(One(Values()))(x))
