# SPDX-License-Identifier: Apache-2.0
"""A model around one kind of block, and the check that rules keep it exact; shared by the tests of regions."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

import remattools as rt
from remattools.jaxpr import jaxprs
from tests.remattools.exactness import assert_exact
from tests.remattools.models import inputs


class Layer(nnx.Module):
    """Base of the blocks below: one projection."""

    def __init__(self, width: int, rngs: nnx.Rngs) -> None:
        self.proj = nnx.Linear(width, width, rngs=rngs)


class Host(nnx.Module):
    """Blocks in `layers`, and `use(model, x)` as the call."""

    def __init__(self, block: type, use: Any, depth: int = 2) -> None:
        rngs = nnx.Rngs(0)
        self.layers = nnx.List([block(8, rngs) for _ in range(depth)])
        self.use = use

    def __call__(self, x: jax.Array) -> Any:
        return self.use(self, x)


def check_exact(block: type, use: Any, *, methods: tuple[str, ...] = ("__call__",), pattern: str = "layers.*") -> None:
    """The ruled model is exact, and under the rule something is a region (the control)."""
    plain, ruled = Host(block, use), Host(block, use)
    rt.apply(ruled, {pattern: rt.Remat(methods=methods)})
    x = inputs(batch=2)
    graphdef, state = nnx.split(ruled)
    program = jax.make_jaxpr(lambda s, x: loss(nnx.merge(graphdef, s, copy=True), x))(state, x)
    assert any(map(jaxprs.is_region, program.eqns))
    plain, ruled = Host(block, use), rt.apply(Host(block, use), {pattern: rt.Remat(methods=methods)})
    assert_exact(loss, plain, ruled, x)


def loss(model: Any, x: jax.Array) -> jax.Array:
    out = jax.tree.leaves(model(x))
    return sum(jnp.sum(leaf**2) for leaf in out if hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.inexact))
