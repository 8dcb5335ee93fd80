# SPDX-License-Identifier: Apache-2.0
"""Plans against the best of all programs: every subset of a block's names, compiled by the TPU's own compiler.

python benchmarks/remat_optimum.py --write docs/benchmarks/remat_optimum.md
"""

import argparse
import datetime
import importlib.metadata
import itertools
import pathlib
import shutil
import tempfile

import jax
import jax.numpy as jnp
from flax import nnx

import remattools as rt
from remattools.plan.cost import rates_of
from remattools.plan.outline import outline

TARGET = "tpu:v5e:2x2"
WITHIN = 1.03


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


class Feedforward(nnx.Module):
    """Two products, with a function inside and one after them."""

    def __init__(self, width: int, rngs: nnx.Rngs) -> None:
        self.up = nnx.Param(0.02 * jax.random.normal(rngs(), (width, 3 * width)))
        self.down = nnx.Param(0.02 * jax.random.normal(rngs(), (3 * width, width)))

    def __call__(self, x: jax.Array) -> jax.Array:
        return x + jnp.sin(jnp.tanh(x @ self.up[...]) @ self.down[...])


class Pointwise(nnx.Module):
    """Two products with three functions between them."""

    def __init__(self, width: int, rngs: nnx.Rngs) -> None:
        self.up = nnx.Param(0.02 * jax.random.normal(rngs(), (width, 2 * width)))
        self.down = nnx.Param(0.02 * jax.random.normal(rngs(), (2 * width, width)))

    def __call__(self, x: jax.Array) -> jax.Array:
        return x + jnp.cos(jnp.exp(-(x @ self.up[...]))) @ self.down[...]


class Stack(nnx.Module):
    def __init__(self, block: type[nnx.Module]) -> None:
        self.layers = nnx.List([block(512, nnx.Rngs(0))])

    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in self.layers:
            x = layer(x)
        return x


def loss(model: nnx.Module, x: jax.Array) -> jax.Array:
    return jnp.mean(model(x) ** 2)


def without_notes(cache: pathlib.Path) -> pathlib.Path:
    """A copy of the measurements for a search that must not know what was tried, and need not compile it again."""
    return pathlib.Path(
        shutil.copytree(cache, tempfile.mkdtemp(), dirs_exist_ok=True, ignore=shutil.ignore_patterns("plan-*"))
    )


def against(reached: float | None, best: float) -> str:
    """Cycles, and their ratio to the best."""
    return " | nothing found" if reached is None else f"{reached / 1e6:.3f} | {reached / best:.3f}"


def section(block: type[nnx.Module], cache: pathlib.Path) -> str:
    model = nnx.eval_shape(lambda: Stack(block))
    x = jax.ShapeDtypeStruct((16_384, 512), jnp.float32)
    (problem,) = outline(loss, model, (x,), rates_of(TARGET)).problems
    names = list(problem.names)
    options = {"target": TARGET, "differentiate": True, "cache": cache}
    tried = {None: rt.measure(loss, model, x, **options)}
    for subset in itertools.chain.from_iterable(itertools.combinations(names, n) for n in range(len(names) + 1)):
        with rt.applied(model, {"layers.*": rt.Remat(save=subset)}):
            tried[subset] = rt.measure(loss, model, x, **options)
        print(block.__name__, subset, tried[subset].temp_bytes, tried[subset].estimated_cycles, flush=True)
    found = rt.frontier(loss, model, x, of="temp", target=TARGET, cache=without_notes(cache))
    rows = []
    for budget in sorted({m.temp_bytes for m in tried.values()}):
        best = min(m.estimated_cycles or 0 for m in tried.values() if m.temp_bytes <= budget)
        curve = min((p.cycles for p in found.points if p.bytes <= budget), default=None)
        try:
            options = {"budget": budget, "of": "temp", "target": TARGET, "cache": without_notes(cache)}
            planned = float(rt.plan(loss, model, x, **options).measured.estimated_cycles or 0)
        except rt.BudgetError:
            planned = None
        print(block.__name__, budget, best, curve, planned, flush=True)
        rows.append(f"| {budget / 1e6:,.1f} | {best / 1e6:.3f} | {against(planned, best)} | {against(curve, best)} |")
    table = "\n".join(rows)
    heading = f"{block.__name__}: {len(names)} values, {len(tried)} programs, {len(found.points)} on the frontier"
    return f"""## {heading}

| budget, temp MB | best of all, M cycles | the budget's own plan | ratio | one frontier for all budgets | ratio |
| ---: | ---: | ---: | ---: | ---: | ---: |
{table}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", type=pathlib.Path, help="write the page here")
    parser.add_argument("--cache", type=pathlib.Path, default=pathlib.Path(tempfile.mkdtemp()))
    args = parser.parse_args()
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "flax", "libtpu"))
    page = f"""# Plans against the best of all programs

Measured {datetime.date.today().isoformat()} with {versions}, by `benchmarks/remat_optimum.py`: every subset of one
block's names and the plain model, compiled for one chip of `{TARGET}` (float32, 16,384 rows of 512). A budget is the
temporaries of one of the programs. For each there is a plan of at most eight compiles, and one frontier of eight
compiles serves them all; neither knew what was tried. The bar is a ratio of {WITHIN}.

"""
    page += "\n".join(section(block, args.cache) for block in (Chain, Gated, Feedforward, Pointwise))
    print(page)
    if args.write is not None:
        args.write.write_text(page)


if __name__ == "__main__":
    main()
