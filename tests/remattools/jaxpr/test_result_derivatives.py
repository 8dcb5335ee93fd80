# SPDX-License-Identifier: Apache-2.0
"""A saved result is what its own derivative reads: it is not recomputed, and gradients do not change."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

import remattools as rt
from remattools.jaxpr import jaxprs
from remattools.jaxpr.result_derivatives import is_result_in_derivative
from tests.remattools.exactness import assert_exact
from tests.remattools.models import One, inputs


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        pytest.param(jnp.exp, True, id="exp"),
        pytest.param(jnp.tanh, True, id="tanh"),
        pytest.param(jax.lax.rsqrt, True, id="rsqrt"),
        pytest.param(lambda x: jax.lax.reduce_max(x, (0,)), True, id="reduce_max"),
        pytest.param(jnp.sin, False, id="sin"),
        pytest.param(lambda x: x + x, False, id="linear"),
        pytest.param(lambda x: x > 0, False, id="bool"),
        pytest.param(jnp.floor, False, id="derivative is zero"),
        pytest.param(jax.jit(jnp.exp), False, id="holds a jaxpr"),
    ],
)
def test_which_derivatives_read_their_own_result(function, expected):
    (equation,) = jax.make_jaxpr(function)(jnp.ones(3)).eqns
    assert is_result_in_derivative(equation) is expected


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
    """Names of the primitives in the gradient's region, recomputed ones included, in order."""
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
def test_a_saved_result_is_not_recomputed_for_its_own_derivative(primitive, activation, names):
    x = inputs()
    model = rt.apply(One(Activated(activation)), {"block": rt.Remat(save=names)})
    assert primitive not in backward_primitives(model, x)
    nothing = rt.apply(One(Activated(activation)), {"block": rt.Remat()})
    assert primitive in backward_primitives(nothing, x)
    assert_exact(lambda m, x: m(x), One(Activated(activation)), model, x)


@pytest.mark.parametrize("axis_type", [jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit], ids=str)
def test_a_saved_result_on_a_mesh_keeps_its_gradient(axis_type):
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


def test_a_constant_result_keeps_its_gradient():
    """An empty product is 1, whatever its operand."""

    class Product(nnx.Module):
        def __call__(self, x):
            return jnp.sin(x) * jnp.prod(x)

    ruled = rt.apply(One(Product()), {"block": rt.Remat(save=("**:*",))})
    assert jax.jit(jax.grad(ruled))(jnp.zeros(0)).shape == (0,)
    assert jnp.allclose(jax.grad(ruled)(jnp.ones(3)), jax.grad(One(Product()))(jnp.ones(3)))


def test_one_result_of_several_keeps_its_derivative():
    """The derivative of singular values recomputes them together with their vectors."""

    class Values(nnx.Module):
        def __call__(self, x):
            return jnp.linalg.svd(x, compute_uv=False)

    x = jnp.arange(6.0).reshape(2, 3)
    ruled = rt.apply(One(Values()), {"block": rt.Remat(save=("**:svd",))})
    assert jnp.allclose(jax.grad(ruled)(x), jax.grad(One(Values()))(x))
