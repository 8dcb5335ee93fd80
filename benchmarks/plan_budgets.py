# SPDX-License-Identifier: Apache-2.0
"""Are budgets kept? Plans for ten budgets each, applied to fresh models and compiled anew.

    python benchmarks/plan_budgets.py [--targets cpu tpu:v5e:2x2] [--write]

For each model and target one frontier with the default number of compiles; then ten budgets from the least that it
reached to what the plain model takes. Each plan's rule file is read back, applied to a model that was built afresh, and
compiled without any cache; equal programs once. `--write` puts the table into docs/benchmarks/plan_budgets.md, also
where a budget was missed. Exits with 1 then.
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
    """How wide the layers are, and the shape (batch, tokens) of what they get."""

    width: int
    batch: tuple[int, int]

    def __str__(self) -> str:
        return f"width {self.width}, batch {self.batch[0]} x {self.batch[1]:,}"


# A TPU's temporaries of the small one would lie in the chip's own memory, which no budget is about.
SMALL, LARGE = Size(64, (8, 128)), Size(512, (8, 2048))


class Block(nnx.Module):
    """A transformer's layer without masks."""

    def __init__(self, width: int, rngs: nnx.Rngs) -> None:
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.qkv, self.out = nnx.Linear(width, 3 * width, rngs=rngs), nnx.Linear(width, width, rngs=rngs)
        self.up, self.down = nnx.Linear(width, 4 * width, rngs=rngs), nnx.Linear(4 * width, width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        q, k, v = jnp.split(self.qkv(self.norm(x)), 3, axis=-1)
        x = x + self.out(jax.nn.softmax(q @ k.swapaxes(-1, -2)) @ v)
        return x + self.down(jax.nn.gelu(self.up(self.norm(x))))


class Convolution(nnx.Module):
    """State that changes, in a residual block."""

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
    """What is planned: a loss of a model, or a whole AdamW step."""

    name: str
    build: Callable[[int], Any]
    whole: bool = False

    def call(self, size: Size) -> tuple[Any, tuple[Any, ...]]:
        """The function with arguments that nobody has seen yet."""
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
    """Of the models that are planned for a target."""
    return LARGE if target.startswith("tpu") else SMALL


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """Ten budgets of one subject."""

    subject: str
    target: str
    least: int
    plain: int
    plans: int
    kept: int
    reproduced: int
    largest_share: float

    def line(self) -> str:
        """As Markdown."""
        return (
            f"| {self.subject} | {self.target} | {self.least:,} | {self.plain:,} | {self.plans} | "
            f"{self.kept} of {BUDGETS} | {self.reproduced} of {BUDGETS} | {self.largest_share:.3f} |"
        )


def examine(subject: Subject, target: str) -> Row:
    """Plan for ten budgets, and compile each plan again."""
    options: dict[str, Any] = {"target": target, "differentiate": not subject.whole}
    fn, arguments = subject.call(size_for(target))
    curve = rt.frontier(fn, *arguments, of="temp", **options)
    compiled: dict[rt.Rules, rt.Measurement] = {}
    kept, reproduced, largest = 0, 0, 0.0
    for budget in np.linspace(curve.least_bytes, curve.plain_bytes, BUDGETS).astype(int):
        plan = curve.plan(int(budget))
        if plan.rules not in compiled:
            fresh_fn, (model, *rest) = subject.call(size_for(target))
            rt.apply(model, rt.Rules.from_toml(plan.to_toml()))
            compiled[plan.rules] = rt.measure(fresh_fn, model, *rest, **options)
        found = compiled[plan.rules]
        kept += found.temp_bytes <= budget
        reproduced += dataclasses.replace(found, compile_s=0.0) == dataclasses.replace(plan.measured, compile_s=0.0)
        largest = max(largest, found.temp_bytes / int(budget))
    return Row(
        subject=subject.name,
        target=target,
        least=curve.least_bytes,
        plain=curve.plain_bytes,
        plans=len(compiled),
        kept=kept,
        reproduced=reproduced,
        largest_share=largest,
    )


def page(rows: list[Row]) -> str:
    """The table with its date and method."""
    names = [name for name in ("jax", "flax", "libtpu") if name != "libtpu" or any("tpu" in row.target for row in rows)]
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    count = BUDGETS * len(rows)
    kept, reproduced = sum(row.kept for row in rows), sum(row.reproduced for row in rows)
    lines = [
        "# Budgets kept",
        "",
        f"Measured {datetime.date.today()} with {versions}, by `python benchmarks/plan_budgets.py --write`. One",
        "frontier for each model and target, by the default search of eight compiles; ten budgets of temporaries,",
        "evenly from the least that it reached to the plain model. Each plan's rule file is read back, applied to a",
        "model that was built afresh, and compiled without any cache (equal plans once); a budget is kept if the",
        "compiler's own figure is at most the budget, and a plan is reproduced if all its figures equal those",
        f"in the plan. {LAYERS} layers, float32; {SMALL} on the CPU, {LARGE} for a TPU.",
        "",
        f"**{kept} of {count} budgets kept, {reproduced} of {count} plans reproduced.**",
        "",
        "| model | target | least B | plain B | different plans | kept | reproduced | most of a budget used |",
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
    return 0 if all(row.kept == row.reproduced == BUDGETS for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
