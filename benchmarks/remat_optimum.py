# SPDX-License-Identifier: Apache-2.0
"""Compare plans with the best of all programs: every subset of a block's names, compiled by the TPU compiler.

python benchmarks/remat_optimum.py --write docs/benchmarks/remat_optimum.md

The compiled programs are also stored for a test, which searches them on machines without a TPU compiler.
"""

import argparse
import dataclasses
import datetime
import importlib.metadata
import itertools
import json
import pathlib
import shutil
import tempfile
from collections.abc import Iterable

import jax
import jax.numpy as jnp
from flax import nnx

import remattools as rt
from remattools.planner.model.outline import build_outline
from remattools.planner.model.time import get_rates

TARGET = "tpu:v5e:2x2"
WITHIN = 1.03
WIDTH = 512
# Rows of a batch: with the first, a value is larger than on-chip memory; with the second, many fit into it.
ROWS = 131_072, 16_384
STORED = pathlib.Path(__file__).parents[1] / "tests" / "remattools" / "planner" / "programs.json"


class Chain(nnx.Module):
    """Three products with functions between them: values that depend on one another."""

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
    """Two products; subclasses say what comes between and after them."""

    times = 2

    def __init__(self, width: int, rngs: nnx.Rngs) -> None:
        self.up = nnx.Param(0.02 * jax.random.normal(rngs(), (width, self.times * width)))
        self.down = nnx.Param(0.02 * jax.random.normal(rngs(), (self.times * width, width)))


class Feedforward(Pair):
    """One function between the products and one after them."""

    times = 3

    def __call__(self, x: jax.Array) -> jax.Array:
        return x + jnp.sin(jnp.tanh(x @ self.up[...]) @ self.down[...])


class Pointwise(Pair):
    """Three functions between the products."""

    def __call__(self, x: jax.Array) -> jax.Array:
        return x + jnp.cos(jnp.exp(-(x @ self.up[...]))) @ self.down[...]


class Squared(Pair):
    """A squared ReLU between the products."""

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


class Stepwise(nnx.Module):
    """Two residual steps."""

    def __init__(self, width: int, rngs: nnx.Rngs) -> None:
        self.first, self.second = (nnx.Param(0.05 * jax.random.normal(rngs(), (width, width))) for _ in range(2))

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + jnp.tanh(x @ self.first[...])
        return x + jnp.sin(x @ self.second[...])


class Swish(Gated):
    """A gate with another function."""

    def __call__(self, x: jax.Array) -> jax.Array:
        return x + (jax.nn.sigmoid(x @ self.gate[...]) * (x @ self.up[...])) @ self.down[...]


class Weighted(Pair):
    """Weights that sum to one between the products."""

    times = 2

    def __call__(self, x: jax.Array) -> jax.Array:
        weights = jnp.exp(x @ self.up[...])
        return x + (weights / jnp.sum(weights, axis=-1, keepdims=True)) @ self.down[...]


# The search's constants were chosen on the first group; the results of the second were unknown at that time.
CHOSEN_ON = (Chain, Gated, Feedforward, Pointwise, Squared, Bottleneck, Branches)
HELD_OUT = (Stepwise, Swish, Weighted)


@dataclasses.dataclass(frozen=True)
class Case:
    """A block, its dtype, and the rows of its batch."""

    block: type[nnx.Module]
    dtype: str
    rows: int

    def __str__(self) -> str:
        return f"{self.block.__name__}, {self.dtype}, {self.rows:,} rows"


def cases(blocks: Iterable[type[nnx.Module]]) -> list[Case]:
    """Return each block in both dtypes at all sizes."""
    blocks = tuple(blocks)
    return [Case(block, dtype, rows) for rows in ROWS for dtype in ("float32", "bfloat16") for block in blocks]


class Stack(nnx.Module):
    def __init__(self, block: type[nnx.Module]) -> None:
        self.layers = nnx.List([block(WIDTH, nnx.Rngs(0))])

    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in self.layers:
            x = layer(x)
        return x


def loss(model: nnx.Module, x: jax.Array) -> jax.Array:
    return jnp.mean(model(x).astype(jnp.float32) ** 2)


def abstract(case: Case) -> tuple[Stack, jax.ShapeDtypeStruct]:
    """Return an abstract model of one block and its input, shape (rows, width)."""
    graph, state = nnx.split(nnx.eval_shape(lambda: Stack(case.block)))
    state = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, case.dtype), state)
    return nnx.merge(graph, state), jax.ShapeDtypeStruct((case.rows, WIDTH), case.dtype)


def copy_without_plans(cache: pathlib.Path) -> pathlib.Path:
    """Copy the measurements for a search that must not know earlier plans, and need not recompile anything."""
    return pathlib.Path(
        shutil.copytree(cache, tempfile.mkdtemp(), dirs_exist_ok=True, ignore=shutil.ignore_patterns("plan-*"))
    )


@dataclasses.dataclass(frozen=True)
class Program:
    """One compiled program; `names` is None for the plain model."""

    names: tuple[str, ...] | None
    temp_bytes: int
    cycles: int


def compile_all(case: Case, cache: pathlib.Path) -> list[Program]:
    """Compile the plain model and every subset of the block's names."""
    model, x = abstract(case)
    (problem,) = build_outline(loss, model, (x,), get_rates(TARGET)).problems
    names = list(problem.names)
    subsets = itertools.chain.from_iterable(itertools.combinations(names, n) for n in range(len(names) + 1))
    found = []
    for subset in (None, *subsets):
        with rt.applied(model, {} if subset is None else {"layers.*": rt.Remat(save=subset)}):
            measured = rt.measure(loss, model, x, target=TARGET, differentiate=True, cache=cache)
        found.append(Program(subset, measured.temp_bytes, measured.estimated_cycles or 0))
    print(case, len(found), flush=True)
    return found


def format_ratio(reached: float | None, best: float) -> str:
    """Format cycles and their ratio to the best."""
    return " | nothing found" if reached is None else f"{reached / 1e6:.3f} | {reached / best:.3f}"


@dataclasses.dataclass(frozen=True)
class Found:
    """The results of one case.

    Attributes:
        case: The case.
        text: Its section of the page.
        planned: Ratio of each budget's plan to the best, infinite where no plan was found.
        drawn: Ratio of the frontier's plan to the best for each budget, infinite where it has none.
    """

    case: Case
    text: str
    planned: tuple[float, ...]
    drawn: tuple[float, ...]


def section(case: Case, tried: list[Program], cache: pathlib.Path) -> Found:
    """Plan for every budget, without knowledge of the compiled programs."""
    model, x = abstract(case)
    found = rt.frontier(loss, model, x, of="temp", target=TARGET, cache=copy_without_plans(cache))
    rows, ratios = [], []
    for budget in sorted({program.temp_bytes for program in tried}):
        best = min(program.cycles for program in tried if program.temp_bytes <= budget)
        curve = min((point.cycles for point in found.points if point.bytes <= budget), default=None)
        try:
            planned = float(
                rt.plan(
                    loss, model, x, budget=max(budget, 1), of="temp", target=TARGET, cache=copy_without_plans(cache)
                ).measured.estimated_cycles
                or 0
            )
        except rt.BudgetError:
            planned = None
        print(case, budget, best, curve, planned, flush=True)
        ratios.append(tuple(float("inf") if reached is None else reached / best for reached in (planned, curve)))
        rows.append(
            f"| {budget / 1e6:,.1f} | {best / 1e6:.3f} | {format_ratio(planned, best)} | {format_ratio(curve, best)} |"
        )
    table = "\n".join(rows)
    text = f"""## {case}: {len(tried)} programs

| budget, temp MB | best of all, M cycles | plan for this budget | ratio | one frontier for all budgets | ratio |
| ---: | ---: | ---: | ---: | ---: | ---: |
{table}
"""
    return Found(case, text, *zip(*ratios, strict=True))


def within(ratios: Iterable[float]) -> str:
    """Count the ratios that are at most `WITHIN`."""
    ratios = list(ratios)
    return f"{sum(ratio <= WITHIN for ratio in ratios)} of {len(ratios)}"


def summary(found: list[Found]) -> str:
    """Return one row per size and per group of blocks: chosen on, held out."""
    rows = []
    for title, blocks in (("chosen on", CHOSEN_ON), ("held out", HELD_OUT)):
        for size in ROWS:
            mine = [each for each in found if each.case.rows == size and each.case.block in blocks]
            planned = within(ratio for each in mine for ratio in each.planned)
            drawn = within(ratio for each in mine for ratio in each.drawn)
            rows.append(f"| {title} | {size:,} | {len(mine)} | {planned} | {drawn} |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", type=pathlib.Path, help="write the page here")
    parser.add_argument("--cache", type=pathlib.Path, default=pathlib.Path(tempfile.mkdtemp()))
    args = parser.parse_args()
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "flax", "libtpu"))
    today = datetime.date.today().isoformat()
    tried = {case: compile_all(case, args.cache) for case in cases((*CHOSEN_ON, *HELD_OUT))}
    found = [section(case, programs, args.cache) for case, programs in tried.items()]
    page = f"""# Plans against the best of all programs

Measured {today} with {versions}, by `benchmarks/remat_optimum.py`: every subset of one
block's names and the plain model, compiled for one chip of `{TARGET}`. With {ROWS[0]:,} rows of {WIDTH}, a value is
larger than on-chip memory, as in models that need a plan; with {ROWS[1]:,}, many values fit into it, and the
temporaries depend less on what is saved. Each budget equals the temporaries of one of the programs; 0 means that
everything fits into on-chip memory. Each budget has a plan of at most eight compiles, and one frontier of eight
compiles serves all budgets; neither knew the other programs. The goal is a ratio of at most {WITHIN}.

| the search's constants were | rows | models | plans within {WITHIN} | one frontier within {WITHIN} |
| --- | ---: | ---: | ---: | ---: |
{summary(found)}

"""
    page += "\n".join(each.text for each in found)
    print(page)
    if args.write is not None:
        args.write.write_text(page)
        programs = {str(case): [dataclasses.astuple(program) for program in tried[case]] for case in tried}
        STORED.write_text(json.dumps({"measured": f"{today} with {versions}", "programs": programs}) + "\n")


if __name__ == "__main__":
    main()
