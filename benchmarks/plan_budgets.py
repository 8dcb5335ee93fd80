# SPDX-License-Identifier: Apache-2.0
"""Check that plans meet their budgets: ten budgets per model, each plan applied to a new model and recompiled.

    python benchmarks/plan_budgets.py [--targets cpu tpu:v5e:2x2] [--write]

For each model and target, computes one frontier with the default number of compiles, then takes ten budgets from the
minimum it reached to what the plain model needs. Each plan's rule file is read back, applied to a new model, and
compiled without any cache (equal plans once). `--write` writes docs/benchmarks/plan_budgets.md, even if a budget was
missed; the exit code is then 1.
"""

import argparse
import dataclasses
import datetime
import importlib.metadata
import os
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import remattools as rt

PAGE = pathlib.Path(__file__).parents[1] / "docs" / "benchmarks" / "plan_budgets.md"
BUDGETS = 10
LAYERS = 6


@dataclasses.dataclass(frozen=True)
class Size:
    """Width of the layers, and the shape (batch, tokens) of their input."""

    width: int
    batch: tuple[int, int]

    def __str__(self) -> str:
        return f"width {self.width}, batch {self.batch[0]} x {self.batch[1]:,}"


# On a TPU, the temporaries of the small size would fit into on-chip memory, which budgets do not cover.
SMALL, LARGE = Size(64, (8, 128)), Size(512, (8, 2048))


class Block(nnx.Module):
    """A transformer layer without masks."""

    def __init__(self, width: int, rngs: nnx.Rngs) -> None:
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.qkv, self.out = nnx.Linear(width, 3 * width, rngs=rngs), nnx.Linear(width, width, rngs=rngs)
        self.up, self.down = nnx.Linear(width, 4 * width, rngs=rngs), nnx.Linear(4 * width, width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        q, k, v = jnp.split(self.qkv(self.norm(x)), 3, axis=-1)
        x = x + self.out(jax.nn.softmax(q @ k.swapaxes(-1, -2)) @ v)
        return x + self.down(jax.nn.gelu(self.up(self.norm(x))))


class Convolution(nnx.Module):
    """A residual block with state that changes."""

    def __init__(self, width: int, rngs: nnx.Rngs) -> None:
        self.conv = nnx.Conv(width, width, (3,), rngs=rngs)
        self.norm = nnx.BatchNorm(width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return x + jax.nn.silu(self.norm(self.conv(x)))


class Listed(nnx.Module):
    """Layers in a list."""

    def __init__(self, block: Any, width: int) -> None:
        rngs = nnx.Rngs(0)
        self.layers = nnx.List([block(width, rngs) for _ in range(LAYERS)])

    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in self.layers:
            x = layer(x)
        return x


class Scanned(nnx.Module):
    """The same layers in a scan."""

    def __init__(self, width: int) -> None:
        self.layers = nnx.split_rngs(splits=LAYERS)(nnx.vmap(lambda rngs: Block(width, rngs)))(nnx.Rngs(0))

    def __call__(self, x: jax.Array) -> jax.Array:
        return nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.layers)


def loss(model: Any, x: jax.Array) -> jax.Array:
    return jnp.mean(model(x) ** 2)


def step(model: Any, optimizer: Any, x: jax.Array) -> jax.Array:
    value, grads = nnx.value_and_grad(loss)(model, x)
    optimizer.update(model, grads)
    return value


@dataclasses.dataclass(frozen=True)
class Subject:
    """A loss of a model, or a whole AdamW step, to plan for."""

    name: str
    build: Callable[[int], Any]
    whole: bool = False

    def call(self, size: Size) -> tuple[Any, tuple[Any, ...]]:
        """Return the function with newly created arguments."""
        model = nnx.eval_shape(lambda: self.build(size.width))
        x = jax.ShapeDtypeStruct((*size.batch, size.width), jnp.float32)
        if not self.whole:
            return loss, (model, x)
        optimizer = nnx.eval_shape(lambda: nnx.Optimizer(self.build(size.width), optax.adamw(1e-3), wrt=nnx.Param))
        return step, (model, optimizer, x)


SUBJECTS = (
    Subject("list of transformer layers", lambda width: Listed(Block, width)),
    Subject("scan of transformer layers", Scanned),
    Subject("list of convolutions with BatchNorm", lambda width: Listed(Convolution, width)),
    Subject("AdamW step, list", lambda width: Listed(Block, width), whole=True),
    Subject("AdamW step, scan", Scanned, whole=True),
)


def size_for(target: str) -> Size:
    """Return the size of the models for a target."""
    return LARGE if target.startswith("tpu") else SMALL


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """The results of ten budgets for one subject."""

    subject: str
    target: str
    minimum: int
    plain: int
    plans: int
    met: int
    reproduced: int
    largest_share: float

    def line(self) -> str:
        """Format the row as Markdown."""
        return (
            f"| {self.subject} | {self.target} | {self.minimum:,} | {self.plain:,} | {self.plans} | "
            f"{self.met} of {BUDGETS} | {self.reproduced} of {BUDGETS} | {self.largest_share:.3f} |"
        )


def examine(subject: Subject, target: str) -> Row:
    """Plan for ten budgets and recompile each plan."""
    options: dict[str, Any] = {"target": target, "differentiate": not subject.whole}
    fn, arguments = subject.call(size_for(target))
    curve = rt.frontier(fn, *arguments, of="temp", **options)
    compiled: dict[rt.Rules, rt.Measurement] = {}
    met, reproduced, largest = 0, 0, 0.0
    for budget in np.linspace(curve.least_bytes, curve.plain_bytes, BUDGETS).astype(int):
        plan = curve.plan(int(budget))
        if plan.rules not in compiled:
            fresh_fn, (model, *rest) = subject.call(size_for(target))
            rt.apply(model, rt.Rules.from_toml(plan.to_toml()))
            compiled[plan.rules] = rt.measure(fresh_fn, model, *rest, **options)
        found = compiled[plan.rules]
        met += found.temp_bytes <= budget
        reproduced += dataclasses.replace(found, compile_s=0.0) == dataclasses.replace(plan.measured, compile_s=0.0)
        largest = max(largest, found.temp_bytes / int(budget))
    return Row(
        subject=subject.name,
        target=target,
        minimum=curve.least_bytes,
        plain=curve.plain_bytes,
        plans=len(compiled),
        met=met,
        reproduced=reproduced,
        largest_share=largest,
    )


def page(rows: list[Row]) -> str:
    """Format the page, with date and method."""
    names = [name for name in ("jax", "flax", "libtpu") if name != "libtpu" or any("tpu" in row.target for row in rows)]
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    count = BUDGETS * len(rows)
    met, reproduced = sum(row.met for row in rows), sum(row.reproduced for row in rows)
    lines = [
        "# Budgets met",
        "",
        f"Measured {datetime.date.today()} with {versions}, by `python benchmarks/plan_budgets.py --write`. One",
        "frontier for each model and target, from the default search of eight compiles; ten budgets of temporaries,",
        "evenly spaced from the minimum it reached to the plain model. Each plan's rule file is read back, applied to",
        "a new model, and compiled without any cache (equal plans once). A budget is met if the compiler reports at",
        "most the budget; a plan is reproduced if all its measurements equal those in the plan.",
        f"{LAYERS} layers, float32; {SMALL} on the CPU, {LARGE} for a TPU.",
        "",
        f"**{met} of {count} budgets met, {reproduced} of {count} plans reproduced.**",
        "",
        "| model | target | minimum B | plain B | different plans | met | reproduced | most of a budget used |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
        *(row.line() for row in rows),
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--targets", nargs="+", default=["cpu", "tpu:v5e:2x2"])
    parser.add_argument("--write", action="store_true", help="write docs/benchmarks/plan_budgets.md")
    args = parser.parse_args()
    os.environ.pop("REMATTOOLS_CACHE", None)
    rows = []
    for target in args.targets:
        for subject in SUBJECTS:
            rows.append(examine(subject, target))
            print(rows[-1].line(), flush=True)
    text = page(rows)
    print(text)
    if args.write:
        PAGE.write_text(text)
    return 0 if all(row.met == row.reproduced == BUDGETS for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
