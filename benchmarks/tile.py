# SPDX-License-Identifier: Apache-2.0
"""Memory and cycles of a language model whose largest values are computed in pieces, with the TPU compiler.

python benchmarks/tile.py --write docs/benchmarks/tile.md
"""

import argparse
import dataclasses
import datetime
import importlib.metadata
import pathlib

import jax
import jax.numpy as jnp
from flax import nnx

import remattools as rt

TARGET, LENGTH = "tpu:v5e:2x2", 4096


@dataclasses.dataclass(frozen=True)
class Config:
    """Four blocks in the shape of Llama 3.2 1B, tied embeddings."""

    layers: int = 4
    width: int = 2048
    heads: int = 32
    hidden: int = 8192
    vocabulary: int = 128256


class Attention(nnx.Module):
    def __init__(self, config: Config, rngs: nnx.Rngs) -> None:
        self.heads = config.heads
        self.q, self.k, self.v, self.o = (make_linear(config.width, config.width, rngs) for _ in range(4))

    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        batch, length, width = x.shape
        q, k, v = (layer(x).reshape(batch, length, self.heads, -1) for layer in (self.q, self.k, self.v))
        scores = jnp.einsum("bthd,bshd->bhts", q, k).astype(jnp.float32) * (width // self.heads) ** -0.5
        weights = jax.nn.softmax(jnp.where(mask, scores, -1e30), axis=-1).astype(x.dtype)
        return self.o(jnp.einsum("bhts,bshd->bthd", weights, v).reshape(batch, length, width))


class MLP(nnx.Module):
    def __init__(self, config: Config, rngs: nnx.Rngs) -> None:
        self.gate, self.up = (make_linear(config.width, config.hidden, rngs) for _ in range(2))
        self.down = make_linear(config.hidden, config.width, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(nnx.silu(self.gate(x)) * self.up(x))


class Block(nnx.Module):
    def __init__(self, config: Config, rngs: nnx.Rngs) -> None:
        self.norm1, self.norm2 = (make_norm(config.width, rngs) for _ in range(2))
        self.attn, self.mlp = Attention(config, rngs), MLP(config, rngs)

    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        x = x + self.attn(self.norm1(x), mask)
        return x + self.mlp(self.norm2(x))


class LanguageModel(nnx.Module):
    def __init__(self, config: Config, rngs: nnx.Rngs) -> None:
        self.embed = nnx.Embed(config.vocabulary, config.width, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, rngs=rngs)
        self.layers = nnx.List([Block(config, rngs) for _ in range(config.layers)])
        self.norm = make_norm(config.width, rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        length = tokens.shape[1]
        mask = jnp.tril(jnp.ones((length, length), bool))
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x, mask)
        return self.embed.attend(self.norm(x))


def make_linear(width: int, size: int, rngs: nnx.Rngs) -> nnx.Linear:
    return nnx.Linear(width, size, use_bias=False, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, rngs=rngs)


def make_norm(width: int, rngs: nnx.Rngs) -> nnx.RMSNorm:
    return nnx.RMSNorm(width, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, rngs=rngs)


def loss(model: nnx.Module, tokens: jax.Array, labels: jax.Array) -> jax.Array:
    logits = model(tokens).astype(jnp.float32)
    picked = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - picked)


def make_candidates() -> dict[str, dict[str, object] | None]:
    blocks: dict[str, object] = {"layers.*": "nothing_saveable"}
    narrow = rt.Tile(accumulate=None)
    return {
        "plain": None,
        "the blocks save nothing": blocks,
        "loss": {"@loss": rt.Tile()},
        "attention and loss": {"layers.*.attn": rt.Tile(), "@loss": rt.Tile()},
        "attention and loss, gradients added in bfloat16": {"layers.*.attn": narrow, "@loss": narrow},
        "attention and loss, and the blocks save nothing": {**blocks, "layers.*.attn": rt.Tile(), "@loss": rt.Tile()},
        "the same, gradients added in bfloat16": {**blocks, "layers.*.attn": narrow, "@loss": narrow},
        "the same, and the MLP": {**blocks, "layers.*.attn": narrow, "layers.*.mlp": narrow, "@loss": narrow},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", type=pathlib.Path, help="write the page here")
    parser.add_argument("--cache", type=pathlib.Path, help="cache directory")
    args = parser.parse_args()
    config = Config()
    model = nnx.eval_shape(lambda: LanguageModel(config, nnx.Rngs(0)))
    tokens = jax.ShapeDtypeStruct((1, LENGTH), jnp.int32)
    found = rt.compare(
        loss, model, tokens, tokens, candidates=make_candidates(), target=TARGET, differentiate=True, cache=args.cache
    )
    rows = "\n".join(
        f"| {name} | {found[name].temp_bytes / 1e6:,.0f} | {(found[name].estimated_cycles or 0) / 1e6:.1f} |"
        for name in make_candidates()
    )
    explanation = rt.explain(loss, model, tokens, tokens, rules=make_candidates()["attention and loss"])
    pieces = "\n".join(
        f"| `{one.module}` | `{one.largest}` | {one.axis} | {one.pieces} | {one.vanished} values, "
        f"{one.vanished_bytes / 1e6:,.0f} MB | {', '.join(f'{count} {name}' for name, count in one.recomputed)} |"
        for one in explanation.tiles
    )
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "flax", "libtpu"))
    page = f"""# Values in pieces

Measured {datetime.date.today().isoformat()} with {versions}, by `benchmarks/tile.py`: {config.layers} blocks in the
shape of Llama 3.2 1B with tied embeddings, 1 x {LENGTH:,} tokens, bfloat16, the loss as people write it, value and
gradient compiled for one chip of `{TARGET}`. Nothing ran on hardware. The rules are written by hand; 8 pieces and the
axis are the defaults. Temporaries are those of the compiler; cycles are its estimate.

| rules | temp MB | M cycles |
| --- | ---: | ---: |
{rows}

What `explain` says of "attention and loss"; a value counts as if it existed, also where the compiler fuses it away:

| where | largest value | axis | pieces | vanishes | computed again |
| --- | --- | ---: | ---: | --- | --- |
{pieces}

Gradients of weights are added over the pieces in float32 unless `accumulate=None`: for weights in bfloat16 that is a
float32 copy of the largest one (the tied table, {config.vocabulary * config.width * 4 / 1e6:,.0f} MB). With weights in
float32 the memory stays the same.
"""
    print(page)
    if args.write is not None:
        args.write.write_text(page)


if __name__ == "__main__":
    main()
