# SPDX-License-Identifier: Apache-2.0
"""Blocks share a trace if, and only if, their static values are equal."""

import collections
import random
import re
import types

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import remattools as rt
from remattools.transform.capture.cache_key import Freezer
from tests.remattools.exactness import assert_same_values, gradients
from tests.remattools.models import inputs
from tests.remattools.transform.hosts import Host, Layer, check_exact, loss


class Slotted:
    __slots__ = ("__length",)

    def __init__(self, length):
        self.__length = length


class Named(collections.OrderedDict):
    """A mapping with attributes."""


class Queue(collections.deque):
    """Its items are out of sight of `vars`."""


@pytest.mark.parametrize(
    ("one", "other"),
    [
        pytest.param(Slotted(1), Slotted(2), id="private-slot"),
        pytest.param(Queue([1]), Queue([2]), id="subclass-of-deque"),
        pytest.param(collections.deque([1]), collections.deque([2]), id="deque"),
        pytest.param(iter([1]), iter([1]), id="iterator"),
        pytest.param(re.match("a", "a"), re.match("b", "b"), id="match"),
        pytest.param((n for n in "a"), (n for n in "a"), id="generator-function"),
        pytest.param(random.Random(0), random.Random(1), id="generator"),
        pytest.param({0, 8}, {8, 0}, id="order-of-a-set"),
        pytest.param(complex(0.0, -0.0), complex(0.0, 0.0), id="negative-zero"),
        pytest.param(types.SimpleNamespace(a=1), types.SimpleNamespace(a=2), id="namespace"),
        pytest.param(Named(a=1), Named(a=2), id="subclass-of-dict"),
    ],
)
def test_values_that_differ_have_different_keys(one, other):
    assert Freezer().freeze(one) != Freezer().freeze(other)
    assert Freezer().freeze(one) == Freezer().freeze(one)  # control


class Config:
    def __init__(self, scale: float) -> None:
        self.scale = scale
        self.names = ["a", "b"]


@pytest.mark.parametrize("make", [lambda s: [s], lambda s: {"s": s}, Config], ids=["list", "dict", "object"])
def test_unhashable_static_attributes_are_compared_by_value(make):
    traced = []

    class Scaled(Layer):
        def __init__(self, width, rngs):
            super().__init__(width, rngs)
            self.config = make(2.0)

        def __call__(self, x):
            traced.append(1)
            config = self.config
            scale = config[0] if isinstance(config, list) else config["s"] if isinstance(config, dict) else config.scale
            return jnp.sin(self.proj(x)) * scale

    use = lambda m, x: m.layers[1](m.layers[0](x))  # noqa: E731
    check_exact(Scaled, use)
    ruled = rt.apply(Host(Scaled, use), {"layers.*": "nothing_saveable"})
    x = inputs(batch=2)
    traced.clear()
    before, _ = gradients(loss, ruled, x)
    shared = len(traced)
    assert shared <= 1  # equal values share one trace, also with the models of `check`
    for layer in ruled.layers:
        layer.config = make(3.0)
    after, _ = gradients(loss, ruled, x)
    assert len(traced) == shared + 1
    assert float(after) != float(before)


def test_a_static_mutated_between_two_traces_is_traced_again():
    class Scaled(Layer):
        def __init__(self, width, rngs):
            super().__init__(width, rngs)
            self.config = Config(2.0)

        def __call__(self, x):
            return jnp.sin(self.proj(x)) * self.config.scale

    x = inputs(batch=2)
    ruled = rt.apply(Host(Scaled, lambda m, x: m.layers[0](x)), {"layers.*": "nothing_saveable"})
    first, _ = gradients(loss, ruled, x)
    ruled.layers[0].config.scale = 4.0
    second, _ = gradients(loss, ruled, x)
    np.testing.assert_allclose(second, 4 * first, rtol=1e-6)


def test_an_object_with_invisible_content_is_never_shared():
    class Closing(Layer):
        def __init__(self, width, rngs):
            super().__init__(width, rngs)
            self.scale = nnx.static(Opaque())

        def __call__(self, x):
            return jnp.sin(self.proj(x)) * self.scale.next()

    class Opaque:
        def __init__(self):
            self.numbers = iter(range(1, 100))  # no key can represent the position of an iterator

        def next(self):
            return float(next(self.numbers))

    x = inputs(batch=2)
    use = lambda m, x: m.layers[0](m.layers[0](x))  # noqa: E731
    plain, ruled = Host(Closing, use), rt.apply(Host(Closing, use), {"layers.*": "nothing_saveable"})
    assert_same_values(nnx.jit(loss)(ruled, x), nnx.jit(loss)(plain, x))
    rows = rt.explain(ruled).regions
    assert all("traced separately" in row.warnings[0] for row in rows)
