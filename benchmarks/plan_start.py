# SPDX-License-Identifier: Apache-2.0
"""Measure how long `plan` takes before its first compile, on models with many distinct blocks.

    python benchmarks/plan_start.py [--models flux wan ...] [--before FILE] [--write]

Each model is abstract and has the block structure and the widths of a public one. Its blocks differ in a static
attribute (their index) or in their shapes, so that JAX traces each of them by itself. `plan` is stopped when it is
about to compile: what it has taken until then is tracing, differentiating, the integer programs and the predictions.
CPU seconds, not seconds of a clock, so that other work on the machine changes them little. Each model runs in a process
of its own, because JAX keeps traces. `--write` writes docs/benchmarks/plan_start.md, with the CSV of an earlier run
(`--before`) beside the new values.
"""

import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

import remattools as rt

PAGE = pathlib.Path(__file__).parents[1] / "docs" / "benchmarks" / "plan_start.md"
FIELDS = ("model", "blocks", "distinct", "cpu_s", "compiles", "plan_cpu_s")


def _attend(q: jax.Array, k: jax.Array, v: jax.Array, heads: int) -> jax.Array:
    """Return attention of `heads` heads, unfused; all of shape (batch, tokens, width)."""
    split = lambda x: x.reshape(*x.shape[:2], heads, -1).swapaxes(1, 2)  # noqa: E731
    q, k, v = split(q), split(k), split(v)
    scores = jnp.einsum("bhqd,bhkd->bhqk", q, k) / jnp.sqrt(q.shape[-1]).astype(q.dtype)
    out = jnp.einsum("bhqk,bhkd->bhqd", jax.nn.softmax(scores), v)
    return out.swapaxes(1, 2).reshape(q.shape[0], -1, heads * q.shape[-1])


def _rotate(x: jax.Array, heads: int) -> jax.Array:
    """Return `x` with rotary positions, per head."""
    batch, tokens, width = x.shape
    half = width // heads // 2
    angles = jnp.arange(tokens)[:, None] / (10_000 ** (jnp.arange(half) / half))
    cos, sin = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]
    a, b = jnp.split(x.reshape(batch, tokens, heads, -1), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1).reshape(x.shape).astype(x.dtype)


class Attention(nnx.Module):
    """Attention with normed queries and keys and rotary positions; over `context` if one is given."""

    def __init__(self, width: int, heads: int, rngs: nnx.Rngs) -> None:
        self.q, self.k, self.v, self.out = (nnx.Linear(width, width, rngs=rngs) for _ in range(4))
        self.q_norm, self.k_norm = nnx.RMSNorm(width, rngs=rngs), nnx.RMSNorm(width, rngs=rngs)
        self.heads = heads

    def __call__(self, x: jax.Array, context: jax.Array | None = None) -> jax.Array:
        context = x if context is None else context
        q = _rotate(self.q_norm(self.q(x)), self.heads)
        k = _rotate(self.k_norm(self.k(context)), self.heads)
        return self.out(_attend(q, k, self.v(context), self.heads))


class MLP(nnx.Module):
    """A gated feed-forward layer."""

    def __init__(self, width: int, rngs: nnx.Rngs) -> None:
        self.gate, self.up = nnx.Linear(width, 4 * width, rngs=rngs), nnx.Linear(width, 4 * width, rngs=rngs)
        self.down = nnx.Linear(4 * width, width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


class Modulation(nnx.Module):
    """`count` shifts, scales or gates from a conditioning vector."""

    def __init__(self, width: int, count: int, rngs: nnx.Rngs) -> None:
        self.linear, self.count = nnx.Linear(width, count * width, rngs=rngs), count

    def __call__(self, vec: jax.Array) -> list[jax.Array]:
        return jnp.split(self.linear(jax.nn.silu(vec))[:, None], self.count, axis=-1)


class SingleStream(nnx.Module):
    """A block of one stream, as in Z-Image and in Flux' second half."""

    def __init__(self, width: int, heads: int, index: int, rngs: nnx.Rngs) -> None:
        self.index = index
        self.modulation = Modulation(width, 6, rngs)
        self.norm1, self.norm2 = nnx.LayerNorm(width, rngs=rngs), nnx.LayerNorm(width, rngs=rngs)
        self.attention, self.mlp = Attention(width, heads, rngs), MLP(width, rngs)

    def __call__(self, x: jax.Array, vec: jax.Array) -> jax.Array:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(vec)
        x = x + gate1 * self.attention(self.norm1(x) * (1 + scale1) + shift1)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class DoubleStream(nnx.Module):
    """A block of image and text with one attention over both, as in Flux."""

    def __init__(self, width: int, heads: int, index: int, rngs: nnx.Rngs) -> None:
        self.index, self.heads = index, heads
        for stream in ("image", "text"):
            setattr(self, f"{stream}_modulation", Modulation(width, 6, rngs))
            setattr(self, f"{stream}_norm1", nnx.LayerNorm(width, rngs=rngs))
            setattr(self, f"{stream}_norm2", nnx.LayerNorm(width, rngs=rngs))
            setattr(self, f"{stream}_qkv", nnx.Linear(width, 3 * width, rngs=rngs))
            setattr(self, f"{stream}_q_norm", nnx.RMSNorm(width, rngs=rngs))
            setattr(self, f"{stream}_k_norm", nnx.RMSNorm(width, rngs=rngs))
            setattr(self, f"{stream}_out", nnx.Linear(width, width, rngs=rngs))
            setattr(self, f"{stream}_mlp", MLP(width, rngs))

    def __call__(self, image: jax.Array, text: jax.Array, vec: jax.Array) -> tuple[jax.Array, jax.Array]:
        parts, modulations = [], []
        for stream, x in (("text", text), ("image", image)):
            modulation = getattr(self, f"{stream}_modulation")(vec)
            normed = getattr(self, f"{stream}_norm1")(x) * (1 + modulation[1]) + modulation[0]
            q, k, v = jnp.split(getattr(self, f"{stream}_qkv")(normed), 3, axis=-1)
            parts.append((getattr(self, f"{stream}_q_norm")(q), getattr(self, f"{stream}_k_norm")(k), v))
            modulations.append(modulation)
        q, k, v = (jnp.concatenate(pair, axis=1) for pair in zip(*parts, strict=True))
        joint = _attend(_rotate(q, self.heads), _rotate(k, self.heads), v, self.heads)
        halves = jnp.split(joint, [text.shape[1]], axis=1)
        out = []
        for stream, x, half, modulation in zip(("text", "image"), (text, image), halves, modulations, strict=True):
            _, _, gate1, shift2, scale2, gate2 = modulation
            x = x + gate1 * getattr(self, f"{stream}_out")(half)
            normed = getattr(self, f"{stream}_norm2")(x) * (1 + scale2) + shift2
            out.append(x + gate2 * getattr(self, f"{stream}_mlp")(normed))
        return out[1], out[0]


class CrossBlock(nnx.Module):
    """Self-attention, attention over a text and a feed-forward layer, as in Wan."""

    def __init__(self, width: int, heads: int, index: int, rngs: nnx.Rngs) -> None:
        self.index = index
        self.modulation = Modulation(width, 6, rngs)
        self.norm1, self.norm2, self.norm3 = (nnx.LayerNorm(width, rngs=rngs) for _ in range(3))
        self.self_attention, self.cross_attention = Attention(width, heads, rngs), Attention(width, heads, rngs)
        self.mlp = MLP(width, rngs)

    def __call__(self, x: jax.Array, text: jax.Array, vec: jax.Array) -> jax.Array:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(vec)
        x = x + gate1 * self.self_attention(self.norm1(x) * (1 + scale1) + shift1)
        x = x + self.cross_attention(self.norm2(x), text)
        return x + gate2 * self.mlp(self.norm3(x) * (1 + scale2) + shift2)


class Flux(nnx.Module):
    """Double blocks, then single blocks over both streams."""

    def __init__(self, width: int, heads: int, doubles: int, singles: int) -> None:
        rngs = nnx.Rngs(0)
        self.double_blocks = nnx.List([DoubleStream(width, heads, i, rngs) for i in range(doubles)])
        self.single_blocks = nnx.List([SingleStream(width, heads, i, rngs) for i in range(singles)])

    def __call__(self, image: jax.Array, text: jax.Array, vec: jax.Array) -> jax.Array:
        for block in self.double_blocks:
            image, text = block(image, text, vec)
        x = jnp.concatenate([text, image], axis=1)
        for single in self.single_blocks:
            x = single(x, vec)
        return x


class Wan(nnx.Module):
    """Blocks with cross-attention."""

    def __init__(self, width: int, heads: int, depth: int) -> None:
        rngs = nnx.Rngs(0)
        self.blocks = nnx.List([CrossBlock(width, heads, i, rngs) for i in range(depth)])

    def __call__(self, x: jax.Array, text: jax.Array, vec: jax.Array) -> jax.Array:
        for block in self.blocks:
            x = block(x, text, vec)
        return x


class Stages(nnx.Module):
    """Blocks of one stream whose width differs from block to block: none equals another."""

    def __init__(self, widths: tuple[int, ...]) -> None:
        rngs = nnx.Rngs(0)
        self.blocks = nnx.List([SingleStream(width, 8, i, rngs) for i, width in enumerate(widths)])
        self.projections = nnx.List(
            [nnx.Linear(a, b, rngs=rngs) for a, b in zip(widths, (*widths[1:], widths[-1]), strict=True)]
        )
        self.vec_widths = widths

    def __call__(self, x: jax.Array, vec: jax.Array) -> jax.Array:
        for block, projection, width in zip(self.blocks, self.projections, self.vec_widths, strict=True):
            x = projection(block(x, vec[:, :width]))
        return x


class ZImage(nnx.Module):
    """Two refiners, then the main layers."""

    def __init__(self, width: int, heads: int, depth: int) -> None:
        rngs = nnx.Rngs(0)
        self.noise_refiner = nnx.List([SingleStream(width, heads, i, rngs) for i in range(2)])
        self.context_refiner = nnx.List([SingleStream(width, heads, i, rngs) for i in range(2)])
        self.layers = nnx.List([SingleStream(width, heads, i, rngs) for i in range(depth)])

    def __call__(self, x: jax.Array, text: jax.Array, vec: jax.Array) -> jax.Array:
        for block in self.noise_refiner:
            x = block(x, vec)
        for block in self.context_refiner:
            text = block(text, vec)
        x = jnp.concatenate([x, text], axis=1)
        for block in self.layers:
            x = block(x, vec)
        return x


def _floats(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _make_stages(count: int) -> tuple[Any, tuple[Any, ...]]:
    widths = tuple(256 + 64 * i for i in range(count))
    return nnx.eval_shape(lambda: Stages(widths)), (_floats(1, 512, 256), _floats(1, widths[-1]))


def _make_flux(doubles: int, singles: int) -> tuple[Any, tuple[Any, ...]]:
    model = nnx.eval_shape(lambda: Flux(3072, 24, doubles, singles))
    return model, (_floats(1, 1024, 3072), _floats(1, 256, 3072), _floats(1, 3072))


def _make_wan(depth: int, width: int, heads: int) -> tuple[Any, tuple[Any, ...]]:
    model = nnx.eval_shape(lambda: Wan(width, heads, depth))
    return model, (_floats(1, 2048, width), _floats(1, 512, width), _floats(1, width))


def _make_z_image(depth: int) -> tuple[Any, tuple[Any, ...]]:
    model = nnx.eval_shape(lambda: ZImage(3840, 30, depth))
    return model, (_floats(1, 1024, 3840), _floats(1, 256, 3840), _floats(1, 3840))


MODELS: dict[str, Callable[[], tuple[Any, tuple[Any, ...]]]] = {
    "flux": lambda: _make_flux(19, 38),
    "flux-small": lambda: _make_flux(6, 6),
    "wan-1.3b": lambda: _make_wan(30, 1536, 12),
    "wan-14b": lambda: _make_wan(40, 5120, 40),
    "z-image": lambda: _make_z_image(30),
    "stages-12": lambda: _make_stages(12),
    "stages-24": lambda: _make_stages(24),
    "stages-40": lambda: _make_stages(40),
}


class _Stop(Exception):
    """Ends `plan` where it would compile."""


def measure_start(name: str) -> tuple[float, int]:
    """Return the CPU seconds of `plan` before its first compile, and the number of the model's blocks."""
    model, batch = MODELS[name]()

    def loss(model: Any, *args: Any) -> jax.Array:
        return jnp.mean(model(*args) ** 2)

    def stop(_: str) -> None:
        raise _Stop

    start = time.process_time()
    try:
        rt.plan(loss, model, *batch, budget=0.5, target="cpu", progress=stop)
    except _Stop:
        pass
    blocks = sum(isinstance(m, SingleStream | DoubleStream | CrossBlock) for _, m in nnx.iter_modules(model))
    return time.process_time() - start, blocks


if __name__ == "__main__":
    print(sys.argv[1], measure_start(sys.argv[1]))
