# SPDX-License-Identifier: Apache-2.0
"""A causal transformer over characters, in plain flax.nnx.

It contains neither remat nor checkpoint code: `charlm.toml` says what is
recomputed and when a run is saved.
"""

import jax
import jax.numpy as jnp
from flax import nnx


class Attention(nnx.Module):
    """Causal self-attention with dropout on the probabilities."""

    def __init__(self, width: int, heads: int, dropout: float, rngs: nnx.Rngs) -> None:
        self.heads = heads
        self.qkv = nnx.Linear(width, 3 * width, rngs=rngs)
        self.out = nnx.Linear(width, width, rngs=rngs)
        self.dropout = nnx.Dropout(dropout, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        batch, seq, width = x.shape
        q, k, v = jnp.split(self.qkv(x).reshape(batch, seq, self.heads, -1), 3, axis=-1)
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / jnp.sqrt(q.shape[-1])
        scores = jnp.where(jnp.tril(jnp.ones((seq, seq), bool)), scores, -1e9)
        probabilities = self.dropout(jax.nn.softmax(scores))
        mixed = jnp.einsum("bhqk,bkhd->bqhd", probabilities, v)
        return self.out(mixed.reshape(batch, seq, width))


class MLP(nnx.Module):
    """Two layers with a GELU between them."""

    def __init__(self, width: int, dropout: float, rngs: nnx.Rngs) -> None:
        self.up = nnx.Linear(width, 4 * width, rngs=rngs)
        self.down = nnx.Linear(4 * width, width, rngs=rngs)
        self.dropout = nnx.Dropout(dropout, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.dropout(self.down(jax.nn.gelu(self.up(x))))


class Block(nnx.Module):
    """Attention and MLP, each with a norm and a residual connection."""

    def __init__(self, width: int, heads: int, dropout: float, rngs: nnx.Rngs) -> None:
        self.attention_norm = nnx.LayerNorm(width, rngs=rngs)
        self.attention = Attention(width, heads, dropout, rngs)
        self.mlp_norm = nnx.LayerNorm(width, rngs=rngs)
        self.mlp = MLP(width, dropout, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class CharLM(nnx.Module):
    """Map characters `(batch, seq)`, int32, to logits `(batch, seq, vocab)`, float32."""

    def __init__(
        self, *, vocab: int, seq: int, width: int, heads: int, depth: int, dropout: float, rngs: nnx.Rngs
    ) -> None:
        self.embed = nnx.Embed(vocab, width, rngs=rngs)
        self.position = nnx.Param(0.02 * jax.random.normal(rngs.params(), (seq, width)))
        self.blocks = nnx.List([Block(width, heads, dropout, rngs) for _ in range(depth)])
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.head = nnx.Linear(width, vocab, rngs=rngs)

    def __call__(self, characters: jax.Array) -> jax.Array:
        x = self.embed(characters) + self.position[: characters.shape[-1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))
