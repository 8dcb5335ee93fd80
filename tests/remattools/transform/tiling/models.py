# SPDX-License-Identifier: Apache-2.0
"""Small models as people write them, each with a batch and a training loss; none knows of tiling.

Blocks are in `layers`, their attention is `attn`, and what follows it `mlp`.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

BATCH, LENGTH, WIDTH, HEADS, VOCABULARY = 2, 32, 16, 2, 256


def _make_embedding(rows, width, rngs):
    # An embedding computes in the dtype that it is made with.
    return nnx.Embed(rows, width, param_dtype=jnp.float64 if jax.config.jax_enable_x64 else jnp.float32, rngs=rngs)


def _split_heads(x, heads=HEADS):
    return x.reshape(*x.shape[:-1], heads, -1)


class MLP(nnx.Module):
    def __init__(self, rngs, *, rate=0.0, **kinds):
        self.up = nnx.Linear(WIDTH, 4 * WIDTH, rngs=rngs, **kinds)
        self.down = nnx.Linear(4 * WIDTH, WIDTH, rngs=rngs, **kinds)
        self.dropout = nnx.Dropout(rate, rngs=rngs)

    def __call__(self, x):
        return self.dropout(self.down(nnx.gelu(self.up(x))))


class Attention(nnx.Module):
    """Causal attention with dropout of its probabilities, and an optional bias of its scores."""

    def __init__(self, rngs, *, rate=0.0, is_causal=True, **kinds):
        self.qkv = nnx.Linear(WIDTH, 3 * WIDTH, rngs=rngs, **kinds)
        self.out = nnx.Linear(WIDTH, WIDTH, rngs=rngs, **kinds)
        self.dropout = nnx.Dropout(rate, rngs=rngs)
        self.is_causal = is_causal

    def __call__(self, x, bias=None):
        q, k, v = (_split_heads(each) for each in jnp.split(self.qkv(x), 3, -1))
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5
        if bias is not None:
            scores = scores + bias
        if self.is_causal:
            scores = jnp.where(jnp.tril(jnp.ones(scores.shape[-2:], bool)), scores, jnp.finfo(scores.dtype).min)
        probabilities = self.dropout(jax.nn.softmax(scores.astype(jnp.promote_types(jnp.float32, scores.dtype))))
        mixed = jnp.einsum("bhqk,bkhd->bqhd", probabilities.astype(v.dtype), v)
        return self.out(mixed.reshape(x.shape))


class Block(nnx.Module):
    def __init__(self, rngs, *, attention=Attention, mlp=MLP, norm=nnx.LayerNorm, **kinds):
        self.attn_norm, self.mlp_norm = norm(WIDTH, rngs=rngs), norm(WIDTH, rngs=rngs)
        self.attn, self.mlp = attention(rngs, **kinds), mlp(rngs, **kinds)

    def __call__(self, x, *args):
        x = x + self.attn(self.attn_norm(x), *args)
        return x + self.mlp(self.mlp_norm(x))


class Decoder(nnx.Module):
    """GPT: embeddings of tokens and positions, blocks, and a head."""

    def __init__(self, rngs, *, depth=2, block=Block, **kinds):
        self.embed = _make_embedding(VOCABULARY, WIDTH, rngs)
        self.positions = nnx.Param(jax.random.normal(rngs.params(), (LENGTH, WIDTH)))
        self.layers = nnx.List([block(rngs, **kinds) for _ in range(depth)])
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.head = nnx.Linear(WIDTH, VOCABULARY, use_bias=False, rngs=rngs, **kinds_of_weights(kinds))

    def __call__(self, tokens):
        x = self.embed(tokens) + self.positions
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


def kinds_of_weights(kinds):
    return {key: value for key, value in kinds.items() if key in ("dtype", "param_dtype")}


class RelativeBias(nnx.Module):
    """T5's buckets: near distances one each, far ones on a log scale."""

    def __init__(self, rngs):
        self.table = _make_embedding(8, HEADS, rngs)

    def __call__(self, length):
        distance = jnp.maximum(jnp.arange(length)[:, None] - jnp.arange(length)[None], 0)
        far = 4 + (jnp.log(jnp.maximum(distance, 1) / 4) / jnp.log(8.0) * 4).astype(jnp.int32)
        buckets = jnp.where(distance < 4, distance, jnp.minimum(far, 7))
        return self.table(buckets).transpose(2, 0, 1)[None]


class T5(nnx.Module):
    def __init__(self, rngs):
        self.embed, self.bias = _make_embedding(VOCABULARY, WIDTH, rngs), RelativeBias(rngs)
        self.layers = nnx.List([Block(rngs, norm=nnx.RMSNorm) for _ in range(2)])
        self.norm = nnx.RMSNorm(WIDTH, rngs=rngs)

    def __call__(self, tokens):
        x, bias = self.embed(tokens), self.bias(tokens.shape[1])
        for layer in self.layers:
            x = layer(x, bias)
        return self.embed.attend(self.norm(x) * WIDTH**-0.5)  # tied


def _rotate(x):
    """Rotary positions of `(batch, seq, heads, width)`."""
    half = x.shape[-1] // 2
    angle = jnp.arange(x.shape[1])[:, None] / 100.0 ** (jnp.arange(half) / half)
    cos, sin = (f(angle)[None, :, None].astype(x.dtype) for f in (jnp.cos, jnp.sin))
    first, second = x[..., :half], x[..., half:]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1)


class GroupedAttention(nnx.Module):
    """Four heads of queries for two of keys and values."""

    def __init__(self, rngs):
        self.q = nnx.LinearGeneral(WIDTH, (4, 4), use_bias=False, rngs=rngs)
        self.kv = nnx.LinearGeneral(WIDTH, (2, 2, 4), use_bias=False, rngs=rngs)
        self.out = nnx.LinearGeneral((4, 4), WIDTH, axis=(-2, -1), use_bias=False, rngs=rngs)

    def __call__(self, x):
        q, kv = _rotate(self.q(x)), self.kv(x)
        k, v = _rotate(kv[:, :, 0]), kv[:, :, 1]
        grouped = q.reshape(*q.shape[:2], 2, 2, 4)
        scores = jnp.einsum("bqgrd,bkgd->bgrqk", grouped, k) / 2
        is_visible = jnp.arange(x.shape[1])[:, None] >= jnp.arange(x.shape[1])[None]
        weights = jax.nn.softmax(scores, where=is_visible)
        return self.out(jnp.einsum("bgrqk,bkgd->bqgrd", weights, v).reshape(q.shape))


class Gated(nnx.Module):
    def __init__(self, rngs):
        self.gate = nnx.Linear(WIDTH, 4 * WIDTH, use_bias=False, rngs=rngs)
        self.up = nnx.Linear(WIDTH, 4 * WIDTH, use_bias=False, rngs=rngs)
        self.down = nnx.Linear(4 * WIDTH, WIDTH, use_bias=False, rngs=rngs)

    def __call__(self, x):
        return self.down(nnx.silu(self.gate(x)) * self.up(x))


class Llama(nnx.Module):
    def __init__(self, rngs):
        self.embed = _make_embedding(VOCABULARY, WIDTH, rngs)
        self.layers = nnx.List([Block(rngs, attention=GroupedAttention, mlp=Gated, norm=nnx.RMSNorm) for _ in range(2)])
        self.norm = nnx.RMSNorm(WIDTH, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.norm(x) @ self.embed.embedding[...].T


class DenseExperts(nnx.Module):
    """Switch: one-hot dispatch of the two best of four experts, each with a capacity."""

    def __init__(self, rngs, *, experts=4, capacity=24):
        self.router = nnx.Linear(WIDTH, experts, use_bias=False, rngs=rngs)
        self.up = nnx.Param(jax.random.normal(rngs.params(), (experts, WIDTH, 2 * WIDTH)) / 4)
        self.down = nnx.Param(jax.random.normal(rngs.params(), (experts, 2 * WIDTH, WIDTH)) / 4)
        self.experts, self.capacity = experts, capacity
        self.balance = nnx.Intermediate(jnp.zeros(()))

    def __call__(self, x):
        probabilities = jax.nn.softmax(self.router(x))
        weights, chosen = jax.lax.top_k(probabilities, 2)
        mask = jax.nn.one_hot(chosen, self.experts, dtype=x.dtype)
        place = (jnp.cumsum(mask.sum(2), axis=1) - 1)[:, :, None] * mask
        fits = mask * (place < self.capacity)
        slots = jax.nn.one_hot(place.astype(jnp.int32), self.capacity, dtype=x.dtype) * fits[..., None]
        combine = jnp.einsum("btk,btkec->btec", weights, slots)
        expert_in = jnp.einsum("btec,btd->becd", slots.sum(2), x)
        hidden = nnx.relu(jnp.einsum("becd,edf->becf", expert_in, self.up[...]))
        self.balance[...] = (mask.sum(2).mean((0, 1)) * probabilities.mean((0, 1))).sum() * self.experts
        return jnp.einsum("btec,becd->btd", combine, jnp.einsum("becf,efd->becd", hidden, self.down[...]))


class RaggedExperts(nnx.Module):
    """Tokens sorted by their expert, and one product over ragged groups."""

    def __init__(self, rngs, *, experts=4):
        self.router = nnx.Linear(WIDTH, experts, use_bias=False, rngs=rngs)
        self.up = nnx.Param(jax.random.normal(rngs.params(), (experts, WIDTH, 2 * WIDTH)) / 4)
        self.down = nnx.Param(jax.random.normal(rngs.params(), (experts, 2 * WIDTH, WIDTH)) / 4)
        self.experts = experts

    def __call__(self, x):
        tokens = x.reshape(-1, WIDTH)
        weights, chosen = jax.lax.top_k(jax.nn.softmax(self.router(tokens)), 2)
        order = jnp.argsort(chosen.reshape(-1))
        sizes = jnp.bincount(chosen.reshape(-1), length=self.experts).astype(jnp.int32)
        sorted_tokens = jnp.take(tokens, order // 2, axis=0)
        hidden = nnx.silu(jax.lax.ragged_dot(sorted_tokens, self.up[...], sizes))
        out = jax.lax.ragged_dot(hidden, self.down[...], sizes)
        unsorted = jnp.zeros_like(out).at[order].set(out).reshape(*chosen.shape, WIDTH)
        return (unsorted * weights[..., None]).sum(1).reshape(x.shape)


class StateSpace(nnx.Module):
    """A selective diagonal state, by a parallel scan or step by step."""

    def __init__(self, rngs, *, is_parallel=True, states=4):
        self.project = nnx.Linear(WIDTH, WIDTH + 2 * states, rngs=rngs)
        self.decay = nnx.Param(jnp.log(jnp.arange(1.0, states + 1)) + jnp.zeros((WIDTH, 1)))
        self.skip = nnx.Param(jnp.ones(WIDTH))
        self.is_parallel = is_parallel
        self.states = states

    def __call__(self, x):
        step, inward, outward = jnp.split(self.project(x), [WIDTH, WIDTH + self.states], -1)
        step = nnx.softplus(step)[..., None]
        factor = jnp.exp(-step * jnp.exp(self.decay[...]))  # (batch, seq, width, states)
        added = step * inward[:, :, None] * x[..., None]
        if self.is_parallel:
            _, state = jax.lax.associative_scan(lambda a, b: (a[0] * b[0], b[0] * a[1] + b[1]), (factor, added), axis=1)
        else:

            def advance(carry, inputs):
                carry = inputs[0] * carry + inputs[1]
                return carry, carry

            over_time = jax.tree.map(lambda v: v.swapaxes(0, 1), (factor, added))
            state = jax.lax.scan(advance, jnp.zeros_like(added[:, 0]), over_time)[1].swapaxes(0, 1)
        return (state * outward[:, :, None]).sum(-1) + x * self.skip[...]


class PairAttention(nnx.Module):
    """AlphaFold: attention of residues with a bias and a gate, the bias from the pair representation."""

    def __init__(self, rngs, *, width=WIDTH, pair=8):
        self.qkv = nnx.Linear(width, 3 * width, use_bias=False, rngs=rngs)
        self.bias = nnx.Linear(pair, HEADS, use_bias=False, rngs=rngs)
        self.gate, self.out = nnx.Linear(width, width, rngs=rngs), nnx.Linear(width, width, rngs=rngs)

    def __call__(self, x, pair, mask):
        q, k, v = (_split_heads(each) for each in jnp.split(self.qkv(x), 3, -1))
        scores = jnp.einsum("...qhd,...khd->...hqk", q, k) / q.shape[-1] ** 0.5
        scores = scores + jnp.moveaxis(self.bias(pair), -1, -3) + 1e9 * (mask - 1)
        mixed = jnp.einsum("...hqk,...khd->...qhd", jax.nn.softmax(scores), v)
        return self.out(nnx.sigmoid(self.gate(x)) * mixed.reshape(x.shape))


class Evoformer(nnx.Module):
    """Residues (batch, n, width) and pairs (batch, n, n, pair)."""

    def __init__(self, rngs, *, pair=8):
        self.attn, self.pair_norm = PairAttention(rngs), nnx.LayerNorm(pair, rngs=rngs)
        self.attn_pair = PairAttention(rngs, width=pair)
        self.left, self.right = nnx.Linear(WIDTH, 4, rngs=rngs), nnx.Linear(WIDTH, 4, rngs=rngs)
        self.outer = nnx.Linear(16, pair, rngs=rngs)
        self.edges = nnx.Linear(pair, 2 * pair, rngs=rngs)
        self.mlp = nnx.Sequential(
            nnx.Linear(pair, 4 * pair, rngs=rngs), nnx.relu, nnx.Linear(4 * pair, pair, rngs=rngs)
        )

    def __call__(self, x, pair, mask):
        x = x + self.attn(x, self.pair_norm(pair), mask[:, None, None])
        outer = jnp.einsum("bic,bjd->bijcd", self.left(x), self.right(x))
        pair = pair + self.outer(outer.reshape(*outer.shape[:3], -1))
        a, b = jnp.split(nnx.sigmoid(self.edges(self.pair_norm(pair))), 2, -1)
        pair = pair + jnp.einsum("bikc,bjkc->bijc", a, b) / a.shape[1]  # triangle of outgoing edges
        normed = self.pair_norm(pair)
        pair = pair + self.attn_pair(normed, normed[:, None], mask[:, None, None, None])  # around the starting node
        return x, pair + self.mlp(pair)


class Folding(nnx.Module):
    def __init__(self, rngs, *, pair=8):
        self.embed, self.pairs = _make_embedding(21, WIDTH, rngs), nnx.Linear(WIDTH, pair, rngs=rngs)
        self.layers = nnx.List([Evoformer(rngs) for _ in range(1)])
        self.head = nnx.Linear(pair, 16, rngs=rngs)

    def __call__(self, residues, mask):
        x = self.embed(residues)
        pair = self.pairs(x)[:, :, None] + self.pairs(x)[:, None]
        for layer in self.layers:
            x, pair = layer(x, pair, mask)
        return self.head(pair + pair.swapaxes(1, 2))


class ViT(nnx.Module):
    def __init__(self, rngs):
        self.patches = nnx.Conv(3, WIDTH, (4, 4), strides=(4, 4), padding="VALID", rngs=rngs)
        self.cls = nnx.Param(jnp.zeros((1, 1, WIDTH)))
        self.positions = nnx.Param(jax.random.normal(rngs.params(), (1, 65, WIDTH)) / 10)
        self.layers = nnx.List([Block(rngs, attention=functools.partial(Attention, is_causal=False)) for _ in range(2)])
        self.head = nnx.Linear(WIDTH, 10, rngs=rngs)

    def __call__(self, images):
        x = self.patches(images).reshape(images.shape[0], -1, WIDTH)
        x = jnp.concatenate([jnp.broadcast_to(self.cls[...], (x.shape[0], 1, WIDTH)), x], 1) + self.positions
        for layer in self.layers:
            x = layer(x)
        return self.head(x[:, 0])


class ResidualConv(nnx.Module):
    def __init__(self, inward, outward, rngs):
        self.norm = nnx.GroupNorm(inward, num_groups=2, rngs=rngs)
        self.conv = nnx.Conv(inward, outward, (3, 3), rngs=rngs)
        self.time = nnx.Linear(1, outward, rngs=rngs)
        self.batch_norm = nnx.BatchNorm(outward, rngs=rngs)
        self.again = nnx.Conv(outward, outward, (3, 3), rngs=rngs)
        self.skip = nnx.Conv(inward, outward, (1, 1), rngs=rngs)

    def __call__(self, x, time):
        y = self.conv(nnx.silu(self.norm(x))) + self.time(time)[:, None, None]
        return self.skip(x) + self.again(nnx.silu(self.batch_norm(y)))


class UNet(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Conv(3, 8, (3, 3), rngs=rngs)
        self.layers = nnx.List([ResidualConv(8, 8, rngs), ResidualConv(8, WIDTH, rngs), ResidualConv(24, 8, rngs)])
        self.attn = Attention(rngs, is_causal=False)
        self.up = nnx.ConvTranspose(WIDTH, WIDTH, (2, 2), strides=(2, 2), rngs=rngs)
        self.last = nnx.Conv(8, 3, (3, 3), rngs=rngs)

    def __call__(self, x, time):
        top = self.layers[0](self.first(x), time)
        low = self.layers[1](nnx.avg_pool(top, (2, 2), (2, 2)), time)
        flat = low.reshape(low.shape[0], -1, WIDTH)
        low = low + self.attn(flat).reshape(low.shape)
        return self.last(self.layers[2](jnp.concatenate([top, self.up(low)], -1), time))


def compute_token_loss(model, tokens):
    """Next-token cross entropy, shifted as in most trainers."""
    logits = model(tokens).astype(jnp.promote_types(jnp.float32, tokens_dtype(model)))
    return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:]).mean()


def tokens_dtype(model):
    return model.embed.embedding[...].dtype


def compute_balanced_loss(model, tokens):
    loss = compute_token_loss(model, tokens)
    return loss + 0.01 * sum(layer.mlp.balance[...] for layer in model.layers)


def compute_distance_loss(model, residues, mask, bins):
    errors = optax.softmax_cross_entropy_with_integer_labels(model(residues, mask), bins)
    both = mask[:, :, None] * mask[:, None]
    return (errors * both).sum() / (1e-6 + both.sum())


def compute_class_loss(model, images, labels):
    targets = optax.smooth_labels(jax.nn.one_hot(labels, 10), 0.1)
    return optax.softmax_cross_entropy(model(images), targets).mean()


def compute_noise_loss(model, images, noise, time):
    scale = time[:, :, None, None]
    return jnp.mean((model(images * (1 - scale) + noise * scale, time) - noise) ** 2)


def _draw_tokens():
    return (jax.random.randint(jax.random.key(1), (BATCH, LENGTH), 0, VOCABULARY),)


def _draw_proteins():
    keys = jax.random.split(jax.random.key(2), 2)
    mask = jnp.ones((BATCH, LENGTH)).at[1, 20:].set(0)
    residues = jax.random.randint(keys[0], (BATCH, LENGTH), 0, 21)
    return residues, mask, jax.random.randint(keys[1], (BATCH, LENGTH, LENGTH), 0, 16)


def _draw_images():
    return jax.random.normal(jax.random.key(3), (BATCH, 32, 32, 3)), jnp.arange(BATCH)


def _draw_noise():
    keys = jax.random.split(jax.random.key(4), 2)
    images, noise = (jax.random.normal(key, (BATCH, 16, 16, 3)) for key in keys)
    return images, noise, jnp.linspace(0.2, 0.7, BATCH)[:, None]


@dataclasses.dataclass(frozen=True)
class Subject:
    """A model with its training.

    Attributes:
        build: Returns the model from its random streams.
        loss: Training loss, from the model and a batch.
        draw: Returns a batch.
        generator: Generator of the random bits of dropout.
        is_wide: Whether its numbers become float64 where that is on.
    """

    build: Callable[[nnx.Rngs], Any]
    loss: Callable[..., Any] = compute_token_loss
    draw: Callable[[], tuple[Any, ...]] = _draw_tokens
    generator: str = "threefry2x32"
    is_wide: bool = True

    def make(self) -> Any:
        """Return the model with its initial values."""
        model = self.build(nnx.Rngs(params=0, dropout=jax.random.key(1, impl=self.generator)))
        if self.is_wide:
            nnx.update(model, jax.tree.map(_widen, nnx.state(model)))
        return model


def _widen(value):
    is_float = jnp.issubdtype(value.dtype, jnp.floating)
    return value.astype(jnp.float64 if jax.config.jax_enable_x64 else jnp.float32) if is_float else value


SUBJECTS = {
    "gpt-threefry": Subject(lambda rngs: Decoder(rngs, rate=0.2)),
    "gpt-rbg": Subject(lambda rngs: Decoder(rngs, rate=0.2), generator="rbg"),
    "relative-bias": Subject(T5),
    "grouped-queries": Subject(Llama),
    "dense-experts": Subject(lambda rngs: Decoder(rngs, depth=1, mlp=DenseExperts), compute_balanced_loss),
    "ragged-experts": Subject(lambda rngs: Decoder(rngs, depth=1, mlp=RaggedExperts)),
    "parallel-states": Subject(lambda rngs: Decoder(rngs, depth=1, attention=StateSpace)),
    "stepwise-states": Subject(
        lambda rngs: Decoder(rngs, depth=1, attention=functools.partial(StateSpace, is_parallel=False))
    ),
    "pair-bias": Subject(Folding, compute_distance_loss, _draw_proteins),
    "vit": Subject(ViT, compute_class_loss, _draw_images),
    "unet": Subject(UNet, compute_noise_loss, _draw_noise),
    "mixed-precision": Subject(lambda rngs: Decoder(rngs, dtype=jnp.bfloat16, param_dtype=jnp.float32), is_wide=False),
    "mixed-precision-exact": Subject(lambda rngs: Decoder(rngs, dtype=jnp.float64, param_dtype=jnp.float32)),
}
