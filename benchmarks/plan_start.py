# SPDX-License-Identifier: Apache-2.0
"""Measure what `plan` costs beside its compiles, on models with many blocks that JAX traces one by one.

    python benchmarks/plan_start.py [--models flux wan-14b ...] [--plans stages-12 ...] [--csv FILE]
        [--before FILE] [--write]

Each model is abstract and has the block structure and the widths of a public one. Its blocks differ in a static
attribute (their index) or in their shapes, so that JAX traces each of them by itself. Two times are taken, both in CPU
seconds, which other work on the machine changes least: until the first compile starts (tracing the model), and from
its end to the start of the second (choosing what to save). The compiler is left out: it reports the same for every
program, from which the search learns nothing. Each model runs in a process of its own, because JAX keeps traces.
For the models of `--plans`, a whole plan for 0.6 of the plain model's memory is compiled too, for the CPU.

`--csv` stores the values; `--before` reads such a file of an earlier version. `--write` writes
docs/benchmarks/plan_start.md.
"""

import argparse
import contextlib
import csv
import dataclasses
import datetime
import importlib.metadata
import json
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

import remattools as rt

PAGE = pathlib.Path(__file__).parents[1] / "docs" / "benchmarks" / "plan_start.md"
SECONDS = ("start_cpu_s", "choice_cpu_s")
PLANS = ("compiles", "plan_cpu_s")
FIELDS = ("model", "blocks", *SECONDS, *PLANS)
_TITLES = ("until the first compile, s", "choosing what to save, s", "compiles", "whole plan, s")


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
    """Ends `plan` where it would compile for the second time."""


def _loss(model: Any, *args: Any) -> jax.Array:
    return jnp.mean(model(*args) ** 2)


def measure_start(name: str, *, with_choice: bool) -> dict[str, Any]:
    """Return what `plan` takes before its first compile and, `with_choice`, before its second, without the compiler."""
    model, batch = MODELS[name]()
    some = dataclasses.replace(rt.measure(jnp.sin, jnp.ones(3), target="cpu"), temp_bytes=2**40)
    planning = sys.modules[rt.plan.__module__]
    times: list[float] = []

    def mark(_: str) -> None:
        times.append(time.process_time())
        if len(times) == (3 if with_choice else 1):
            raise _Stop

    def leave_out(*_: Any, **__: Any) -> rt.Measurement:
        times.append(time.process_time())
        return some

    planning.measure = leave_out  # type: ignore[attr-defined]  # the compiler
    start = time.process_time()
    with contextlib.suppress(_Stop):
        rt.plan(_loss, model, *batch, budget=2**30, target="cpu", progress=mark)
    blocks = sum(isinstance(m, SingleStream | DoubleStream | CrossBlock) for _, m in nnx.iter_modules(model))
    choice = {"choice_cpu_s": times[2] - times[1]} if with_choice else {}
    return {"blocks": blocks, "start_cpu_s": times[0] - start, **choice}


def measure_plan(name: str) -> dict[str, Any]:
    """Return the number of compiles and the CPU seconds of a whole plan."""
    model, batch = MODELS[name]()
    start = time.process_time()
    found = rt.plan(_loss, model, *batch, budget=0.6, target="cpu", progress=lambda _: None)
    return {"compiles": len(found.points), "plan_cpu_s": time.process_time() - start}


def run_process(name: str, what: str) -> dict[str, Any]:
    """Return what one of the functions above measures in a new process."""
    command = [sys.executable, __file__, "--models", name, "--measure", what]
    result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    lines = [line for line in result.stdout.splitlines() if line.startswith("{")]  # earlier versions let solvers print
    values: dict[str, Any] = json.loads(lines[0])
    return values


def format_page(rows: list[dict[str, Any]], before: dict[str, dict[str, str]]) -> str:
    """Return the page: one row for each model, with an earlier version's values before the arrows."""

    def show(row: dict[str, Any], field: str) -> str:
        if field not in row:
            return ""
        is_time = field.endswith("_s")
        value, old = f"{row[field]:.1f}" if is_time else str(row[field]), before.get(row["model"], {}).get(field)
        if not old:
            return value
        return f"{float(old):.1f} → {value}" if is_time else f"{old} → {value}"

    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "flax", "scipy"))
    slowest = max(row["start_cpu_s"] for row in rows)
    lines = [
        "# Time to the first compile",
        "",
        f"Measured {datetime.date.today()} with {versions}, by `python benchmarks/plan_start.py --write`,",
        "on a machine with 2 cores that other work shared. CPU seconds of `rt.plan` for the gradient of a loss of an",
        "abstract model, in a new process: until the first compile starts (tracing the model), and from its end to the",
        "start of the second (choosing what to save). The compiler is left out. JAX traces each of these blocks by",
        "itself: in flux, wan and z-image they differ in their index; in stages they differ in their width, so that",
        "each is also a problem of its own for the search. A whole plan, where it was compiled, is for 0.6 of the",
        "plain model's memory on the CPU; cells without a value were not measured."
        + (" Before each arrow: the version that chose what to save before the first compile." if before else ""),
        "",
        f"**The first compile starts after at most {slowest:.1f} CPU seconds.**",
        "",
    ]
    titles = dict(zip((*SECONDS, *PLANS), _TITLES, strict=True))
    shown = [field for field in titles if any(field in row for row in rows)]
    lines += [
        f"| model | blocks | {' | '.join(titles[field] for field in shown)} |",
        f"| --- | ---: |{' ---: |' * len(shown)}",
    ]
    for row in rows:
        cells = (row["model"], str(row["blocks"]), *(show(row, field) for field in shown))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--plans", nargs="*", choices=MODELS, default=[], help="models whose whole plan is compiled")
    parser.add_argument("--csv", type=pathlib.Path, help="where to store the values")
    parser.add_argument("--before", type=pathlib.Path, help="values of an earlier version, from --csv")
    parser.add_argument("--write", action="store_true", help="write the page")
    parser.add_argument("--start-only", action="store_true", help="leave out the choice of what to save")
    parser.add_argument("--measure", choices=("start", "choice", "plan"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        name = args.models[0]
        values = (
            measure_plan(name) if args.measure == "plan" else measure_start(name, with_choice=args.measure == "choice")
        )
        print(json.dumps(values))
        return
    rows: list[dict[str, Any]] = []
    for name in args.models:
        rows.append({"model": name, **run_process(name, "start" if args.start_only else "choice")})
        if name in args.plans:
            rows[-1] |= run_process(name, "plan")
        print(rows[-1], flush=True)
    before: dict[str, dict[str, str]] = {}
    if args.before:
        with args.before.open(encoding="utf-8") as file:
            before = {row["model"]: row for row in csv.DictReader(file)}
    if args.csv:
        with args.csv.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, FIELDS)
            writer.writeheader()
            writer.writerows(rows)
    page = format_page(rows, before)
    print(page)
    if args.write:
        PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
