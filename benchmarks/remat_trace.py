# SPDX-License-Identifier: Apache-2.0
"""Measure what rules cost before the first step: seconds to trace and lower, against plain and hand-written code.

    python benchmarks/remat_trace.py [--write docs/benchmarks/remat_trace.md]

All measurements come from one process on one machine and are reported as ratios:
seconds differ between machines, ratios hardly. JAX's caches are cleared before
every trace, the variants alternate, and the fastest of the rounds counts, since
other load on the machine only adds time.
"""

import argparse
import dataclasses
import datetime
import gc
import importlib.metadata
import os
import pathlib
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
from flax import nnx

import remattools as rt

HEADS = 4


class Block(nnx.Module):
    """An ordinary pre-norm transformer block."""

    def __init__(self, width: int, rngs: nnx.Rngs) -> None:
        self.norm1 = nnx.LayerNorm(width, rngs=rngs)
        self.qkv = nnx.Linear(width, 3 * width, rngs=rngs)
        self.out = nnx.Linear(width, width, rngs=rngs)
        self.norm2 = nnx.LayerNorm(width, rngs=rngs)
        self.up = nnx.Linear(width, 4 * width, rngs=rngs)
        self.down = nnx.Linear(4 * width, width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        batch, seq, width = x.shape
        q, k, v = jnp.split(self.qkv(self.norm1(x)).reshape(batch, seq, HEADS, 3 * width // HEADS), 3, axis=-1)
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / jnp.sqrt(q.shape[-1])
        scores = jnp.where(jnp.tril(jnp.ones((seq, seq), bool)), scores, -1e9)
        mixed = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v).reshape(x.shape)
        x = x + self.out(mixed)
        return x + self.down(nnx.gelu(self.up(self.norm2(x))))


def call_plain(layer: Block, x: jax.Array) -> jax.Array:
    return layer(x)


def by_nnx_remat(layer: Block, x: jax.Array) -> jax.Array:
    """Remat as in flax's documentation and in tunix."""
    return nnx.remat(Block.__call__)(layer, x)


def by_jax_checkpoint(layer: Block, x: jax.Array) -> jax.Array:
    """Remat as written by hand with JAX's transformation."""
    graphdef, state = nnx.split(layer)
    return jax.checkpoint(lambda state, x: nnx.merge(graphdef, state)(x))(state, x)


class Tower(nnx.Module):
    """`depth` blocks; `run` calls each of them."""

    def __init__(self, depth: int, width: int, run: Callable[..., jax.Array], rngs: nnx.Rngs) -> None:
        self.layers = nnx.List([Block(width, rngs) for _ in range(depth)])
        self.run = run

    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in self.layers:
            x = self.run(layer, x)
        return x


VARIANTS = {"plain": call_plain, "rule": call_plain, "nnx.remat": by_nnx_remat, "jax.checkpoint": by_jax_checkpoint}


def build(variant: str, depth: int, width: int, *, abstract: bool = True) -> Tower:
    """Create a model of one variant; abstract models have shapes only."""

    def make() -> Tower:
        return Tower(depth, width, VARIANTS[variant], nnx.Rngs(0))

    model: Tower = nnx.eval_shape(make) if abstract else make()
    if variant == "rule":
        rt.apply(model, {"layers.*": "nothing_saveable"})
    return model


def lower_gradient(model: Tower, x: Any) -> Any:
    """Trace and lower the gradient of a loss with respect to all parameters."""
    graphdef, params = nnx.split(model)

    def loss(params: Any, x: jax.Array) -> jax.Array:
        return jnp.mean(nnx.merge(graphdef, params)(x) ** 2)

    return jax.jit(jax.grad(loss)).lower(params, x)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table."""

    what: str
    value: float
    limit: str
    holds: bool

    def __str__(self) -> str:
        return f"| {self.what} | {self.value:.3g} | {self.limit} | {'yes' if self.holds else '**no**'} |"


def trace_rows(repeats: int) -> tuple[list[Row], dict[str, float]]:
    """Time tracing and lowering by variant and depth, and return the ratios."""
    x = jax.ShapeDtypeStruct((2, 16, 32), jnp.float32)
    cases = [("plain", 96), ("nnx.remat", 96), ("jax.checkpoint", 96), ("rule", 96), ("rule", 48)]
    models = {case: build(*case, 32) for case in cases}
    seconds: dict[tuple[str, int], float] = {}
    for _ in range(repeats):
        for case, model in models.items():
            jax.clear_caches()
            gc.collect()
            start = time.perf_counter()
            lower_gradient(model, x)
            seconds[case] = min(seconds.get(case, float("inf")), time.perf_counter() - start)
    ours = seconds["rule", 96]
    rows = [
        _at_most("trace + lower, 96 layers: rule / plain", ours / seconds["plain", 96], 0.40),
        _at_most("trace + lower, 96 layers: rule / hand-written nnx.remat", ours / seconds["nnx.remat", 96], 0.33),
        _at_most("trace + lower: rule at 96 layers / at 48", ours / seconds["rule", 48], 2.2),
    ]
    return rows, {f"{variant}, {depth} layers": value for (variant, depth), value in seconds.items()}


def program_rows(steps: int) -> list[Row]:
    """Compare the compiled program under a rule with that of hand-written jax.checkpoint."""
    variants = ("rule", "jax.checkpoint")
    x = jax.random.normal(jax.random.key(0), (4, 128, 128))
    params, compiled = {}, {}
    for variant in variants:
        model = build(variant, 6, 128, abstract=False)
        params[variant] = nnx.split(model)[1]
        compiled[variant] = lower_gradient(model, x).compile()
    ours, theirs = (compiled[v] for v in variants)
    flops = ours.cost_analysis()["flops"] / theirs.cost_analysis()["flops"]
    temp = ours.memory_analysis().temp_size_in_bytes / theirs.memory_analysis().temp_size_in_bytes
    taken: dict[str, list[float]] = {v: [] for v in variants}
    for _ in range(steps):
        for variant in variants:
            start = time.perf_counter()
            jax.block_until_ready(compiled[variant](params[variant], x))
            taken[variant].append(time.perf_counter() - start)
    # The fastest step of each: what the program needs when nothing else runs.
    fastest = min(taken["rule"]) / min(taken["jax.checkpoint"])
    noise = statistics.median(taken["jax.checkpoint"]) / min(taken["jax.checkpoint"]) - 1
    return [
        _about("flops: rule / hand-written jax.checkpoint", flops, 0.01),
        _about("temp bytes: rule / hand-written jax.checkpoint", temp, 0.01),
        _about("step time: rule / hand-written jax.checkpoint", fastest, max(0.05, noise)),
    ]


class Leaf(nnx.Module):
    """A minimal module, so that only the number of modules counts."""

    def __init__(self, value: jax.Array) -> None:
        self.scale = nnx.Param(value)

    def __call__(self, x: jax.Array) -> jax.Array:
        return x * self.scale


class Pair(nnx.Module):
    """A block of four leaves."""

    def __init__(self, value: jax.Array) -> None:
        self.parts = nnx.List([Leaf(value) for _ in range(4)])

    def __call__(self, x: jax.Array) -> jax.Array:
        for part in self.parts:
            x = part(x)
        return x


def time_apply(blocks: int) -> tuple[float, int]:
    """Time `apply` on a new model with five modules per block, and count the arrays that it copied."""
    model = nnx.List([Pair(jnp.ones(())) for _ in range(blocks)])
    arrays = [id(variable.get_value()) for _, variable in nnx.iter_graph(model) if isinstance(variable, nnx.Param)]
    start = time.perf_counter()
    rt.apply(model, {"*": "nothing_saveable", "[::2].parts.*": "dots_saveable"})
    seconds = time.perf_counter() - start
    after = [id(variable.get_value()) for _, variable in nnx.iter_graph(model) if isinstance(variable, nnx.Param)]
    return seconds, sum(a != b for a, b in zip(arrays, after, strict=True))


def apply_rows(repeats: int) -> list[Row]:
    """Time `apply` on 10,000 modules."""
    seconds, copied = zip(*(time_apply(2_000) for _ in range(repeats)), strict=True)
    return [
        _at_most("apply on 10,000 modules, seconds", min(seconds), 1.0),
        _at_most("arrays copied by apply", max(copied), 0),
    ]


def _at_most(what: str, value: float, limit: float) -> Row:
    return Row(what=what, value=value, limit=f"at most {limit:g}", holds=value <= limit)


def _about(what: str, value: float, tolerance: float) -> Row:
    return Row(what=what, value=value, limit=f"1 within {tolerance:.1%}", holds=abs(value - 1) <= tolerance)


def page(rows: list[Row], seconds: dict[str, float], repeats: int) -> str:
    """Format the page."""
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "flax"))
    lines = [
        "# What rules cost before the first step",
        "",
        f"Measured by `python benchmarks/remat_trace.py --write` on {datetime.date.today().isoformat()} with"
        f" {versions}, Python {platform.python_version()}, {os.cpu_count()} CPU cores.",
        "",
        "| | measured | goal | met |",
        "| --- | --- | --- | --- |",
        *map(str, rows),
        "",
        "The first three ratios come from these seconds, which depend on the machine and its load:",
        "",
        "| variant | seconds |",
        "| --- | --- |",
        *(f"| {name} | {value:.2f} |" for name, value in seconds.items()),
        "",
        "Method: the model is a stack of pre-norm transformer blocks. The benchmark times tracing and lowering the",
        "gradient of a mean-square loss with respect to all parameters. JAX's caches are cleared before every trace,",
        f"the variants alternate in one process, and the fastest of {repeats} rounds counts. `rule` is the unedited",
        'model under `{"layers.*": "nothing_saveable"}`; `nnx.remat` and `jax.checkpoint` are the same model with the',
        "call of each block written by hand. The compiled programs are compared at 6 blocks of width 128. The step",
        "time is the fastest of the run; its tolerance is the spread of the hand-written program's steps. On a busy",
        "machine that spread is wide and the row means little; equal flops and bytes mean more.",
        "`apply` is timed on 2,000 blocks of five modules each, with two rules, on new models; the fastest counts.",
        "",
    ]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--write", type=pathlib.Path, help="Markdown file to write")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    rows, seconds = trace_rows(options.repeats)
    rows += program_rows(options.steps) + apply_rows(options.repeats)
    text = page(rows, seconds, options.repeats)
    if options.write:
        options.write.parent.mkdir(parents=True, exist_ok=True)
        options.write.write_text(text)
    print(text)
    return 0 if all(row.holds for row in rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
