# SPDX-License-Identifier: Apache-2.0
"""`@remat` on classes, models, methods and functions."""

import inspect
import pickle

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import remattools as rt
from remattools.jaxpr import jaxprs
from tests.remattools.exactness import assert_exact
from tests.remattools.models import Block, Tower, inputs, loss


def regions(model, x):
    program = jax.make_jaxpr(lambda x: loss(model, x))(x)
    return sum(map(jaxprs.is_region, program.eqns))


@rt.remat
class Decorated(nnx.Module):
    """A block."""

    def __init__(self, width: int, rngs: nnx.Rngs) -> None:
        self.proj = nnx.Linear(width, width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Shape in, shape out."""
        return jnp.sin(jnp.cos(self.proj(x)))


class Undecorated(nnx.Module):
    def __init__(self, width: int, rngs: nnx.Rngs) -> None:
        self.proj = nnx.Linear(width, width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return jnp.sin(jnp.cos(self.proj(x)))


@rt.remat(policy="nothing_saveable", every_n=2)
class EverySecond(Tower):
    pass


@rt.remat(rules={"attention": "dots_saveable"})
class Ruled(Tower):
    pass


def test_a_class_without_parentheses():
    x = inputs()
    assert regions(Tower(block=Decorated), x) == 3
    assert regions(Tower(block=Undecorated), x) == 0
    assert_exact(loss, Tower(block=Undecorated), Tower(block=Decorated), x)


def test_signature_docstring_and_pickling_stay():
    assert Decorated.__doc__ == "A block."
    assert Decorated.__call__.__doc__ == "Shape in, shape out."
    assert list(inspect.signature(Decorated.__call__).parameters) == ["self", "x"]
    again = pickle.loads(pickle.dumps(Decorated(8, nnx.Rngs(0))))
    assert type(again) is Decorated


def test_a_model_class_with_every_n():
    model = EverySecond(depth=5)
    assert [row.path for row in rt.explain(model).regions] == ["layers.0", "layers.2", "layers.4"]
    assert_exact(loss, Tower(depth=5), model, inputs())


def test_a_model_class_with_rules():
    assert [row.path for row in rt.explain(Ruled(depth=2)).regions] == ["layers.0.attention", "layers.1.attention"]


def test_a_model_class_without_a_sequence_raises():
    @rt.remat(every_n=2)
    class Single(nnx.Module):
        def __init__(self):
            self.proj = nnx.Linear(8, 8, rngs=nnx.Rngs(0))

        def __call__(self, x):
            return self.proj(x)

    with pytest.raises(rt.RuleError) as caught:
        Single()
    assert "sequence" in caught.value.what


def test_a_method():
    class Model(nnx.Module):
        def __init__(self):
            self.block = Block(8, nnx.Rngs(0))

        @rt.remat(policy="dots_saveable")
        def inner(self, x, flag=False):
            return jnp.sin(self.block(x)) if flag else self.block(x)

        def __call__(self, x):
            return self.inner(x, flag=True)

    class Plain(Model):
        def inner(self, x, flag=False):
            return jnp.sin(self.block(x)) if flag else self.block(x)

    assert regions(Model(), inputs()) == 1
    assert_exact(loss, Plain(), Model(), inputs())


def test_a_function_of_nnx_objects():
    def run(model, x, *, times):
        for _ in range(times):
            x = jnp.sin(model(x))
        return x

    class Model(nnx.Module):
        def __init__(self, function):
            self.block, self.function = Block(8, nnx.Rngs(0)), function

        def __call__(self, x):
            return self.function(self.block, x, times=2)

    assert regions(Model(rt.remat(run)), inputs()) == 1
    assert_exact(loss, Model(run), Model(rt.remat(policy="dots_saveable", save=("attention.qkv",))(run)), inputs())


@pytest.mark.parametrize(
    "decorate",
    [
        pytest.param(lambda: rt.remat("nothing_saveable"), id="positional-policy"),
        pytest.param(lambda: rt.remat(every_n=2)(lambda x: x), id="every_n-on-a-function"),
        pytest.param(lambda: rt.remat(type("Plain", (), {})), id="no-module"),
        pytest.param(lambda: rt.remat(methods=("nope",))(type("M", (Tower,), {})), id="no-such-method"),
    ],
)
def test_what_cannot_be_decorated(decorate):
    with pytest.raises(rt.RuleError) as caught:
        decorate()
    assert caught.value.what
    assert caught.value.fix
