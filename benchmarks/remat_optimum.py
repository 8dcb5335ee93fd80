# SPDX-License-Identifier: Apache-2.0
"""Plans against the best of all programs: every subset of a block's names, compiled by the TPU's own compiler.

python benchmarks/remat_optimum.py --write docs/benchmarks/remat_optimum.md
"""

import argparse
import dataclasses
import datetime
import importlib.metadata
import itertools
import pathlib
import shutil
import tempfile
from collections.abc import Iterable

import jax
import jax.numpy as jnp
from flax import nnx

import remattools as rt
from remattools.plan.cost import rates_of
from remattools.plan.outline import outline

TARGET = "tpu:v5e:2x2"
WITHIN = 1.03
TUNED = 4


class Chain(nnx.Module):
    """Three products with something between them: values that depend on one another."""

    def __init__(self, width: int, rngs: nnx.Rngs) -> None:
        shapes = (width, 2 * width), (2 * width, 2 * width), (2 * width, width)
        self.up, self.across, self.down = (nnx.Param(0.1 * jax.random.normal(rngs(), s)) for s in shapes)

    def __call__(self, x: jax.Array) -> jax.Array:
        hidden = jnp.sin(x @ self.up[...])
        return x + jnp.cos(hidden @ self.across[...]) @ self.down[...]


class Gated(nnx.Module):
    """A gate: two branches that meet."""

    def __init__(self, width: int, rngs: nnx.Rngs) -> None:
        self.gate, self.up = (nnx.Param(0.1 * jax.random.normal(rngs(), (width, 2 * width))) for _ in range(2))
        self.down = nnx.Param(0.1 * jax.random.normal(rngs(), (2 * width, width)))

    def __call__(self, x: jax.Array) -> jax.Array:
        return x + (jnp.sin(x @ self.gate[...]) * (x @ self.up[...])) @ self.down[...]


class Pair(nnx.Module):
    """Two products; each kind says what lies between and behind them."""

    times = 2

    def __init__(self, width: int, rngs: nnx.Rngs) -> None:
        self.up = nnx.Param(0.02 * jax.random.normal(rngs(), (width, self.times * width)))
        self.down = nnx.Param(0.02 * jax.random.normal(rngs(), (self.times * width, width)))


class Feedforward(Pair):
    """With a function between them and one behind."""

    times = 3

    def __call__(self, x: jax.Array) -> jax.Array:
        return x + jnp.sin(jnp.tanh(x @ self.up[...]) @ self.down[...])


class Pointwise(Pair):
    """With three functions between them."""

    def __call__(self, x: jax.Array) -> jax.Array:
        return x + jnp.cos(jnp.exp(-(x @ self.up[...]))) @ self.down[...]


class Squared(Pair):
    """With the square of a rectifier between them."""

    def __call__(self, x: jax.Array) -> jax.Array:
        hidden = jnp.maximum(x @ self.up[...], 0.0)
        return x + (hidden * hidden) @ self.down[...]


class Bottleneck(nnx.Module):
    """Two products through a quarter of the width."""

    def __init__(self, width: int, rngs: nnx.Rngs) -> None:
        self.down = nnx.Param(0.05 * jax.random.normal(rngs(), (width, width // 4)))
        self.up = nnx.Param(0.05 * jax.random.normal(rngs(), (width // 4, width)))

    def __call__(self, x: jax.Array) -> jax.Array:
        return x + jnp.tanh(jnp.sin(x @ self.down[...]) @ self.up[...])


class Branches(nnx.Module):
    """Two branches of different width, side by side."""

    def __init__(self, width: int, rngs: nnx.Rngs) -> None:
        self.up = nnx.Param(0.05 * jax.random.normal(rngs(), (width, 4 * width)))
        self.down = nnx.Param(0.05 * jax.random.normal(rngs(), (4 * width, width)))
        self.side = nnx.Param(0.05 * jax.random.normal(rngs(), (width, width)))

    def __call__(self, x: jax.Array) -> jax.Array:
        return jnp.tanh(x @ self.side[...]) + jnp.exp(x @ self.up[...]) @ self.down[...]


BLOCKS = (Chain, Gated, Feedforward, Pointwise, Squared, Bottleneck, Branches)
CASES = tuple((block, dtype) for dtype in (jnp.float32, jnp.bfloat16) for block in BLOCKS)


class Stack(nnx.Module):
    def __init__(self, block: type[nnx.Module]) -> None:
        self.layers = nnx.List([block(512, nnx.Rngs(0))])

    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in self.layers:
            x = layer(x)
        return x


def loss(model: nnx.Module, x: jax.Array) -> jax.Array:
    return jnp.mean(model(x).astype(jnp.float32) ** 2)


def abstract(block: type[nnx.Module], dtype: jnp.dtype) -> tuple[Stack, jax.ShapeDtypeStruct]:
    """A model of one block in a dtype, and what it gets, shape (rows, width)."""
    graph, state = nnx.split(nnx.eval_shape(lambda: Stack(block)))
    state = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), state)
    return nnx.merge(graph, state), jax.ShapeDtypeStruct((16_384, 512), dtype)


def without_notes(cache: pathlib.Path) -> pathlib.Path:
    """A copy of the measurements for a search that must not know what was tried, and need not compile it again."""
    return pathlib.Path(
        shutil.copytree(cache, tempfile.mkdtemp(), dirs_exist_ok=True, ignore=shutil.ignore_patterns("plan-*"))
    )


def against(reached: float | None, best: float) -> str:
    """Cycles, and their ratio to the best."""
    return " | nothing found" if reached is None else f"{reached / 1e6:.3f} | {reached / best:.3f}"


@dataclasses.dataclass(frozen=True)
class Found:
    """What one model came to.

    Attributes:
        text: Its part of the page.
        planned: Ratios of the budgets' own plans to the best, infinite where nothing was found.
        drawn: Likewise of one frontier.
    """

    text: str
    planned: tuple[float, ...]
    drawn: tuple[float, ...]


def section(block: type[nnx.Module], dtype: jnp.dtype, cache: pathlib.Path) -> Found:
    """Try everything, then plan without knowing it."""
    model, x = abstract(block, dtype)
    (problem,) = outline(loss, model, (x,), rates_of(TARGET)).problems
    names = list(problem.names)
    options = {"target": TARGET, "differentiate": True, "cache": cache}
    tried = {None: rt.measure(loss, model, x, **options)}
    for subset in itertools.chain.from_iterable(itertools.combinations(names, n) for n in range(len(names) + 1)):
        with rt.applied(model, {"layers.*": rt.Remat(save=subset)}):
            tried[subset] = rt.measure(loss, model, x, **options)
        print(block.__name__, subset, tried[subset].temp_bytes, tried[subset].estimated_cycles, flush=True)
    found = rt.frontier(loss, model, x, of="temp", target=TARGET, cache=without_notes(cache))
    rows, ratios = [], []
    for budget in sorted({m.temp_bytes for m in tried.values()}):
        best = min(m.estimated_cycles or 0 for m in tried.values() if m.temp_bytes <= budget)
        curve = min((p.cycles for p in found.points if p.bytes <= budget), default=None)
        try:
            options = {"budget": max(budget, 1), "of": "temp", "target": TARGET, "cache": without_notes(cache)}
            planned = float(rt.plan(loss, model, x, **options).measured.estimated_cycles or 0)
        except rt.BudgetError:
            planned = None
        print(block.__name__, budget, best, curve, planned, flush=True)
        ratios.append(tuple(float("inf") if reached is None else reached / best for reached in (planned, curve)))
        rows.append(f"| {budget / 1e6:,.1f} | {best / 1e6:.3f} | {against(planned, best)} | {against(curve, best)} |")
    table = "\n".join(rows)
    heading = f"{block.__name__}, {jnp.dtype(dtype).name}: {len(names)} values, {len(tried)} programs"
    text = f"""## {heading}

| budget, temp MB | best of all, M cycles | the budget's own plan | ratio | one frontier for all budgets | ratio |
| ---: | ---: | ---: | ---: | ---: | ---: |
{table}
"""
    return Found(text, *zip(*ratios, strict=True))


def within(ratios: Iterable[float]) -> str:
    """How many reach the bar."""
    ratios = list(ratios)
    return f"{sum(ratio <= WITHIN for ratio in ratios)} of {len(ratios)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", type=pathlib.Path, help="write the page here")
    parser.add_argument("--cache", type=pathlib.Path, default=pathlib.Path(tempfile.mkdtemp()))
    args = parser.parse_args()
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "flax", "libtpu"))
    found = [section(block, dtype, args.cache) for block, dtype in CASES]
    first, others = found[:TUNED], found[TUNED:]
    page = f"""# Plans against the best of all programs

Measured {datetime.date.today().isoformat()} with {versions}, by `benchmarks/remat_optimum.py`: every subset of one
block's names and the plain model, compiled for one chip of `{TARGET}` (16,384 rows of 512). A budget is the
temporaries of one of the programs; 0 means that all lies in the chip's own memory. For each there is a plan of at most
eight compiles, and one frontier of eight compiles serves them all; neither knew what was tried. The bar is a ratio of
{WITHIN}. The search's constants were chosen on the first {TUNED} models, four of them (how far doubts count, and when a
search ends) once more with all but the last in view, and with the groups' page.

| models | plans within {WITHIN} | one frontier within {WITHIN} |
| --- | ---: | ---: |
| the first {TUNED} | {within(r for f in first for r in f.planned)} | {within(r for f in first for r in f.drawn)} |
| the others | {within(r for f in others for r in f.planned)} | {within(r for f in others for r in f.drawn)} |

"""
    page += "\n".join(each.text for each in found)
    print(page)
    if args.write is not None:
        args.write.write_text(page)


if __name__ == "__main__":
    main()
