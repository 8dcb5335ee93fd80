# SPDX-License-Identifier: Apache-2.0
"""The search against the best there is: by trying everything, and by an integer program over all blocks."""

import itertools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import remattools as rt
from remattools.planner.model.outline import build_outline
from remattools.planner.model.time import get_rates
from remattools.planner.search.space import Space

from ..models import loss
from .optimum import least_cycles

WITHIN = 1.03


class Small(nnx.Module):
    """Few values to choose from: three matrix products and what is between them."""

    def __init__(self, width: int, rngs: nnx.Rngs) -> None:
        shape = (width, 2 * width)
        self.up, self.across, self.down = (
            nnx.Param(0.1 * jax.random.normal(rngs(), s)) for s in (shape, (2 * width, 2 * width), shape[::-1])
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        hidden = jnp.sin(x @ self.up[...])
        return x + jnp.cos(hidden @ self.across[...]) @ self.down[...]


class Transformer(nnx.Module):
    """About thirty values a layer."""

    def __init__(self, width: int, rngs: nnx.Rngs) -> None:
        self.q, self.k, self.v, self.o = (nnx.Linear(width, width, use_bias=False, rngs=rngs) for _ in range(4))
        self.up = nnx.Linear(width, 4 * width, use_bias=False, rngs=rngs)
        self.down = nnx.Linear(4 * width, width, use_bias=False, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6)
        q, k, v = self.q(y), self.k(y), self.v(y)
        x = x + self.o(jax.nn.softmax(q @ k.swapaxes(-1, -2)) @ v)
        y = x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6)
        return x + self.down(jax.nn.silu(self.up(y)))


class Stack(nnx.Module):
    def __init__(self, block: Any, depth: int, width: int) -> None:
        rngs = nnx.Rngs(0)
        self.layers = nnx.List([block(width, rngs) for _ in range(depth)])

    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in self.layers:
            x = layer(x)
        return x


def test_small_plans_are_near_the_best_of_all_programs(tmp_path: pathlib.Path) -> None:
    """Memory by the compiler, for every subset of the names and for no region; time by the planner's model."""
    model = nnx.eval_shape(lambda: Stack(Small, 1, 32))
    x = jax.ShapeDtypeStruct((512, 32), jnp.float32)
    shape = build_outline(loss, model, (x,), get_rates("cpu"))
    (problem,) = shape.problems
    names = list(problem.names)
    assert 4 <= len(names) <= 6  # else trying everything proves nothing, or does not end
    subsets = itertools.chain.from_iterable(itertools.combinations(names, n) for n in range(len(names) + 1))
    tried = [(0.0, rt.measure(loss, model, x, target="cpu", differentiate=True, cache=tmp_path).temp_bytes)]
    for subset in subsets:
        with rt.applied(model, {"layers.*": rt.Remat(save=subset)}):
            measured = rt.measure(loss, model, x, target="cpu", differentiate=True, cache=tmp_path)
        tried.append((problem.make_choice(subset).total_cycles, measured.temp_bytes))
    found = rt.frontier(loss, model, x, of="temp", target="cpu", cache=tmp_path)
    plain, most = shape.count_plain_cycles(), 0.0
    for budget in {size for _, size in tried if size >= found.least_bytes}:
        best = plain + min(cycles for cycles, size in tried if size <= budget)
        most = max(most, (plain + max(cycles for cycles, size in tried if size <= budget)) / best)
        reached = min(point.cycles for point in found.points if point.bytes <= budget)
        assert reached <= WITHIN * best
    assert most > 1.2  # control: choosing badly costs more than what is allowed
    # What the frontier does not reach, a plan of its own does, with more compiles than the default.
    least = min(size for _, size in tried)
    own = rt.plan(loss, model, x, budget=least, of="temp", target="cpu", max_compiles=12, cache=tmp_path)
    best = plain + min(cycles for cycles, size in tried if size <= least)
    assert min(point.cycles for point in own.points if point.bytes <= least) <= WITHIN * best


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 0.8])
def test_the_search_is_near_the_integer_optimum(share: float) -> None:
    model = nnx.eval_shape(lambda: Stack(Transformer, 2, 512))
    x = jax.ShapeDtypeStruct((2, 1024, 512), jnp.float32)
    shape = build_outline(loss, model, (x,), get_rates("tpu:v5e:2x2"))
    space = Space(shape)
    assert 40 <= 2 * len(shape.problems[0].names) <= 90
    least, most = space.bytes.min(), space.bytes[space.assignments.index(space.plain)]
    budget = least + share * (most - least)
    reached = float(space.cycles[space.bytes <= budget].min())
    best = least_cycles(shape, budget)
    plain = shape.count_plain_cycles()
    assert plain + reached <= WITHIN * (plain + best)
    assert best <= reached * 1.001  # control: the bound is one
    if share < 0.5:
        assert best > 0


def test_the_bound_is_the_search_where_both_see_everything() -> None:
    """One block, its budget at each level's own bytes: the program finds nothing worse than the level."""
    model = nnx.eval_shape(lambda: Stack(Small, 1, 32))
    shape = build_outline(loss, model, (jax.ShapeDtypeStruct((512, 32), jnp.float32),), get_rates("tpu:v5e:2x2"))
    space = Space(shape)
    for size, cycles in zip(space.bytes, space.cycles, strict=True):
        assert least_cycles(shape, float(size) + 1.0) <= cycles * 1.001 + 1e-6
    assert np.isinf(least_cycles(shape, float(space.bytes.min()) * 0.3))
