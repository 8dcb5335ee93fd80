# SPDX-License-Identifier: Apache-2.0
"""Small models with the structure of real ones; shared by the tests."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx


class MLP(nnx.Module):
    def __init__(self, width: int, rngs: nnx.Rngs) -> None:
        self.up = nnx.Linear(width, 2 * width, rngs=rngs)
        self.down = nnx.Linear(2 * width, width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(jnp.sin(jnp.cos(self.up(x))))


class Attention(nnx.Module):
    def __init__(self, width: int, rngs: nnx.Rngs) -> None:
        self.qkv = nnx.Linear(width, 3 * width, rngs=rngs)
        self.out = nnx.Linear(width, width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        q, k, v = jnp.split(self.qkv(x), 3, axis=-1)
        scores = jax.nn.softmax(q @ k.swapaxes(-1, -2))
        return self.out(scores @ v)


class Block(nnx.Module):
    def __init__(self, width: int, rngs: nnx.Rngs) -> None:
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.attention = Attention(width, rngs)
        self.mlp = MLP(width, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.attention(self.norm(x))
        return x + self.mlp(self.norm(x))


class Tower(nnx.Module):
    """A stack of blocks; shape `(batch, seq, width)` in and out."""

    def __init__(self, depth: int = 3, width: int = 8, *, block: Any = Block, seed: int = 0) -> None:
        rngs = nnx.Rngs(seed)
        self.layers = nnx.List([block(width, rngs) for _ in range(depth)])
        self.head = nnx.Linear(width, width, rngs=rngs)

    def __call__(self, x: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
        for layer in self.layers:
            x = layer(x, *args, **kwargs)
        return self.head(x)


class One(nnx.Module):
    """One block and a sum, so that the gradient holds exactly one region."""

    def __init__(self, block: Any) -> None:
        self.block = block

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.block(x).sum()


def inputs(batch: int = 4, seq: int = 6, width: int = 8) -> jax.Array:
    return jax.random.normal(jax.random.key(1), (batch, seq, width))


def loss(model: Any, *args: Any, **kwargs: Any) -> jax.Array:
    out = model(*args, **kwargs)
    return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(out) if jnp.issubdtype(leaf.dtype, jnp.floating))
