# SPDX-License-Identifier: Apache-2.0
"""Unusual use: errors inside a region, threads, hundreds of `apply` calls, JAX's debug checks."""

import concurrent.futures
import dataclasses
import functools
import gc
import weakref
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import remattools as rt

from ..exactness import assert_exact, assert_same_values, gradients
from ..models import Block, Tower, inputs, loss

WIDTH = 8


class Base(nnx.Module):
    """A block around something odd; subclasses say what `odd` is."""

    def __init__(self, width, rngs):
        self.linear = nnx.Linear(width, width, rngs=rngs)
        self.make(width, rngs)

    def make(self, width, rngs):
        pass

    def __call__(self, x):
        return x + self.odd(jnp.sin(self.linear(x)))

    def odd(self, x):
        return jnp.cos(x)


@jax.custom_vjp
def clipped(x):
    return jnp.exp(x)


clipped.defvjp(lambda x: (jnp.exp(x), jnp.exp(x)), lambda saved, g: (jnp.clip(g * saved, -0.1, 0.1),))


class CustomVjp(Base):
    def odd(self, x):
        return clipped(x)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def scaled(x, by):
    return x * by


@scaled.defjvp
def _(by, primals, tangents):
    return primals[0] * by, tangents[0] * by * 3


class CustomJvp(Base):
    def odd(self, x):
        return scaled(jnp.sin(x), 2)


class Lora(Base):
    def make(self, width, rngs):
        self.lora = nnx.LoRALinear(width, width, lora_rank=2, rngs=rngs)

    def odd(self, x):
        return self.lora(x)


class Inherited(CustomVjp):
    """Calls its base's method of the same name."""

    def __call__(self, x):
        return super().__call__(jnp.tanh(x)) * 2


class Shaped(NamedTuple):
    value: jax.Array
    nothing: None
    label: str


class Pair(Base):
    """Returns a named tuple with None and a string, and takes it apart itself."""

    def inner(self, x):
        return Shaped(jnp.sin(x), None, "label")

    def odd(self, x):
        value, nothing, label = self.inner(x)
        assert nothing is None
        assert label == "label"
        return value


class Aliased(Base):
    """Returns its argument twice and a view of its parameter."""

    def __call__(self, x):
        y = super().__call__(x)
        return y * self.linear.kernel[...].sum() + x


@dataclasses.dataclass
class Data(nnx.Module):
    width: int
    rngs: nnx.Rngs

    def __post_init__(self):
        self.linear = nnx.Linear(self.width, self.width, rngs=self.rngs)

    def __call__(self, x):
        return jnp.sin(self.linear(x)) + x


class Partial(Base):
    def scaled_call(self, x, factor):
        return super().__call__(x) * factor

    __call__ = functools.partialmethod(scaled_call, factor=3.0)


class Integers(Base):
    """Integers and booleans on the way, and an integer Variable that counts."""

    def make(self, width, rngs):
        self.count = nnx.BatchStat(jnp.zeros((), jnp.int32))

    def odd(self, x):
        self.count[...] += (x > 0).sum()
        order = jnp.argsort(x, axis=-1)
        return jnp.take_along_axis(jnp.sin(x), order, axis=-1)


class Looping(Base):
    def odd(self, x):
        x = jax.lax.fori_loop(0, 3, lambda i, y: jnp.sin(y) + i, x)
        return jax.lax.cond(x.sum() > 0, jnp.sin, jnp.cos, x)


class Checkpointed(Base):
    """Contains a `jax.checkpoint`."""

    def odd(self, x):
        return jax.checkpoint(lambda y: jnp.sin(jnp.cos(y)))(x)


class Dropping(Base):
    def make(self, width, rngs):
        self.dropout = nnx.Dropout(0.2, rngs=rngs)

    def odd(self, x):
        return self.dropout(jnp.sin(x))


BLOCKS = [
    CustomVjp, CustomJvp, Lora, Inherited, Pair, Aliased, Data, Partial, Integers, Looping, Checkpointed, Dropping,
]  # fmt: skip
RULES: list[Any] = [{"layers.*": "nothing_saveable"}, {"layers.*": rt.Remat(save=("linear",), every_n=2)}]


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.__name__)
@pytest.mark.parametrize("rules", RULES, ids=["nothing", "names"])
def test_odd_blocks_are_exact(block, rules):
    assert_exact(loss, Tower(depth=2, block=block), rt.apply(Tower(depth=2, block=block), rules), inputs())


class Jitted(nnx.Module):
    def __init__(self, width, rngs):
        self.linear = nnx.Linear(width, width, rngs=rngs)
        self.calls = nnx.Variable(jnp.zeros((), jnp.int32))

    @nnx.jit
    def __call__(self, x):
        self.calls[...] += 1
        return x + jnp.sin(self.linear(x))


class JittedOverFunction(Base):
    __call__ = nnx.jit(lambda self, x: 2 * Base.__call__(self, x))


class PartialCall(Base):
    def scaled(self, x, scale):
        return scale * jnp.sin(self.linear(x))

    __call__ = functools.partialmethod(scaled, scale=2)


class PropertyCall(Base):
    @property
    def __call__(self):
        return lambda x: 2 * jnp.sin(self.linear(x))


class PropertyOverMethod(Base):
    @property
    def odd(self):
        return lambda x: 2 * x


class Holding(nnx.Module):
    """The odd module is inside the region, where modules carry paths while operations are named."""

    odd: type

    def __init__(self, width, rngs):
        self.inner = self.odd(width, rngs)

    def __call__(self, x):
        return self.inner(x)


METHODS = [Jitted, JittedOverFunction, PartialCall, PropertyCall, PropertyOverMethod]


@pytest.mark.parametrize("block", METHODS, ids=lambda block: block.__name__)
def test_callables_that_are_not_functions_as_methods(block):
    holding = type("Holding", (Holding,), {"odd": block})
    for kind, action in (
        (block, "nothing_saveable"),
        (block, rt.Remat(save=("linear",))),
        (block, rt.Remat(group=2)),
        (holding, rt.Remat(save=("inner",))),
        (holding, rt.Remat(group=2)),
    ):
        ruled = rt.apply(Tower(depth=2, block=kind), {"layers.*": action})
        assert_exact(loss, Tower(depth=2, block=kind), ruled, inputs())


def test_second_derivatives_and_forward_mode():
    plain, ruled = (Tower(depth=1, block=Base) for _ in range(2))
    rt.apply(ruled, "nothing_saveable", on="layers.*")

    def products(model):
        graphdef, state = nnx.split(model)
        direction = jax.tree.map(jnp.ones_like, state)

        def of(state):
            return loss(nnx.merge(graphdef, state, copy=True), inputs())

        _, forward = jax.jvp(of, (state,), (direction,))
        _, hessian = jax.jvp(jax.grad(of), (state,), (direction,))
        _, linear = jax.linearize(of, state)
        return {"forward": forward, "linear": linear(direction), "hessian": nnx.to_pure_dict(hessian)}

    assert_same_values(products(ruled), products(plain))


def test_an_error_inside_a_region_leaves_the_model_unchanged():
    class Failing(Base):
        fail = True

        def odd(self, x):
            if type(self).fail:
                raise RuntimeError("the block's own error")
            return jnp.cos(x)

    ruled = rt.apply(Tower(block=Failing), "nothing_saveable", on="layers.*")
    before = nnx.to_pure_dict(nnx.state(ruled))
    with pytest.raises(RuntimeError, match="the block's own error"):
        gradients(loss, ruled, inputs())
    assert_same_values(nnx.to_pure_dict(nnx.state(ruled)), before)
    Failing.fail = False
    assert_exact(loss, Tower(block=Failing), ruled, inputs())


def test_threads_trace_at_the_same_time():
    expected = [gradients(loss, Tower(depth=1, seed=seed), inputs()) for seed in range(3)]
    models = [rt.apply(Tower(depth=1, seed=seed), {"layers.*": rt.Remat(save=("mlp",))}) for seed in range(3)]
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda model: gradients(loss, model, inputs()), models))
    for ours, plain in zip(found, expected, strict=True):
        assert_same_values(ours, plain)


def test_three_hundred_applications_leave_nothing_behind():
    class Own(Block):
        pass

    model = Tower(depth=2, block=Own)
    actions = [rt.Remat(policy) for policy in ("nothing_saveable", "dots_saveable", "everything_saveable")]
    for number in range(300):
        with rt.applied(model, {"layers.*": actions[number % 3]}):
            pass
    gc.collect()
    assert [cls.__name__ for cls in Own.__subclasses__()] in ([], ["Own"])  # one generated class, not three hundred
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None  # (nnx itself keeps every class: it registers them as pytrees)


@pytest.mark.parametrize("option", ["jax_enable_checks", "jax_check_tracer_leaks", "jax_debug_nans"])
def test_jaxs_own_checks_find_nothing(option):
    before = getattr(jax.config, option)
    # Under jax_remat3 a hand-written `save_only_these_names` leaks a tracer, too (jax 0.12.0.1).
    save = () if getattr(jax.config, "jax_remat3", False) else ("linear",)
    jax.config.update(option, True)
    try:
        ruled = rt.apply(Tower(depth=1, block=Dropping), {"layers.*": rt.Remat(save=save)})
        assert_exact(loss, Tower(depth=1, block=Dropping), ruled, inputs())
    finally:
        jax.config.update(option, before)


def test_donated_state():
    def train(model):
        graphdef, state = nnx.split(model)

        @functools.partial(jax.jit, donate_argnums=0)
        def step(state, x):
            grads = jax.grad(lambda s: loss(nnx.merge(graphdef, s, copy=True), x))(state)
            return jax.tree.map(lambda a, g: a - 0.01 * g, state, grads)

        for _ in range(3):
            state = step(state, inputs())
        return nnx.to_pure_dict(state)

    assert_same_values(train(rt.apply(Tower(), "nothing_saveable", on="layers.*")), train(Tower()))


@pytest.mark.parametrize("jitted", [True, False], ids=["jit", "eager"])
def test_decoding_with_a_cache(jitted):
    class Decoder(Base):
        def make(self, width, rngs):
            self.attention = nnx.MultiHeadAttention(2, width, decode=True, rngs=rngs)

        def odd(self, x):
            return self.attention(x)

    def decode(model):
        for layer in model.layers:
            layer.attention.init_cache((2, 5, WIDTH))
        call = nnx.jit(lambda m, x: m(x)) if jitted else lambda m, x: m(x)
        outs = [call(model, inputs(2, 5)[:, i : i + 1]) for i in range(5)]
        index = [int(layer.attention.cache_index[...]) for layer in model.layers]
        return jnp.concatenate(outs, axis=1), index

    ours, ours_index = decode(rt.apply(Tower(block=Decoder), "nothing_saveable", on="layers.*"))
    plain, plain_index = decode(Tower(block=Decoder))
    assert ours_index == plain_index == [5, 5, 5]
    np.testing.assert_allclose(ours, plain, rtol=1e-5, atol=1e-6)


def test_only_some_parameters_are_differentiated():
    frozen = nnx.All(nnx.Param, nnx.PathContains("mlp"))

    def grads(model):
        return nnx.to_pure_dict(nnx.jit(nnx.grad(loss, argnums=nnx.DiffState(0, frozen)))(model, inputs()))

    assert_same_values(grads(rt.apply(Tower(), "dots_saveable", on="layers.*")), grads(Tower()))


def test_variables_removed_and_replaced_inside():
    class Forgetful(Base):
        def make(self, width, rngs):
            self.once = nnx.Cache(jnp.ones((width,)))

        def odd(self, x):
            if hasattr(self, "once"):
                x = x * self.once[...]
                del self.once
            self.last = nnx.Cache(x.mean())
            return x

    def run(model):
        nnx.jit(lambda m, x: m(x))(model, inputs())
        return nnx.to_pure_dict(nnx.state(model))

    assert_same_values(
        run(rt.apply(Tower(block=Forgetful), "nothing_saveable", on="layers.*")), run(Tower(block=Forgetful))
    )
