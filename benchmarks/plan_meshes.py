# SPDX-License-Identifier: Apache-2.0
"""Predictions and plans on meshes of 8 devices, against what the compiler says of each device.

    python benchmarks/plan_meshes.py [--target cpu] [--assignments 40] [--rows 4] [--no-budgets] [--write]

For each model, assignments spread evenly over the predicted sizes are compiled, and the predictions made before the
first compile are set against `temp_bytes` per device. Then budgets are planned. `--write` writes one section of
docs/benchmarks/plan_meshes.md. A TPU's compiler needs a minute for each program, and what fits into on-chip memory is
not counted, so that `--target tpu:v5e:2x4` wants few assignments, many rows and no budgets.
"""

import argparse
import datetime
import importlib.metadata
import os
import pathlib
import re
from collections.abc import Callable
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import remattools as rt
from remattools.analysis.compare import use_rules
from remattools.planner.model.outline import build_outline
from remattools.planner.model.time import get_rates
from remattools.planner.search.space import Space
from remattools.planner.search.to_rules import write_rules

PAGE = pathlib.Path(__file__).parents[1] / "docs" / "benchmarks" / "plan_meshes.md"
BUDGETS = 0.3, 0.5, 0.8
WIDTH, HEADS, DEPTH = 256, 4, 4
Case = tuple[Callable[..., Any], Any, Any]


class Attention(nnx.Module):
    """A block of attention and an MLP."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.norm, self.norm2 = nnx.LayerNorm(WIDTH, rngs=rngs), nnx.LayerNorm(WIDTH, rngs=rngs)
        self.qkv, self.out = nnx.Linear(WIDTH, 3 * WIDTH, rngs=rngs), nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.up, self.down = nnx.Linear(WIDTH, 4 * WIDTH, rngs=rngs), nnx.Linear(4 * WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        rows, tokens, _ = x.shape
        parts = self.qkv(self.norm(x)).reshape(rows, tokens, 3, HEADS, WIDTH // HEADS)
        scores = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", parts[:, :, 0], parts[:, :, 1]), axis=-1)
        x = x + self.out(jnp.einsum("bhqk,bkhd->bqhd", scores, parts[:, :, 2]).reshape(x.shape))
        return x + self.down(jax.nn.gelu(self.up(self.norm2(x))))


class Gated(nnx.Module):
    """A block of a gated MLP."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.norm = nnx.RMSNorm(WIDTH, rngs=rngs)
        self.gate, self.up = (nnx.Linear(WIDTH, 4 * WIDTH, use_bias=False, rngs=rngs) for _ in range(2))
        self.down = nnx.Linear(4 * WIDTH, WIDTH, use_bias=False, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        hidden = self.norm(x)
        return x + self.down(jax.nn.silu(self.gate(hidden)) * self.up(hidden))


class Tower(nnx.Module):
    """Blocks of one kind."""

    def __init__(self, block: Callable[[nnx.Rngs], nnx.Module]) -> None:
        rngs = nnx.Rngs(0)
        self.layers = nnx.List([block(rngs) for _ in range(DEPTH)])

    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in self.layers:
            x = layer(x)
        return x


def compute_loss(model: nnx.Module, x: jax.Array) -> jax.Array:
    return jnp.mean(jnp.square(model(x)))


def shard(leaf: Any, mesh: Any, *axes: str | None) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, PartitionSpec(*axes)))


def place_model(block: Callable[[nnx.Rngs], nnx.Module], place: Callable[[str, Any], Any]) -> nnx.Module:
    """Return an abstract tower whose leaves have the shardings that `place` gives to their paths."""
    model = nnx.eval_shape(lambda: Tower(block))
    place_leaf = lambda path, leaf: place(jax.tree_util.keystr(path, simple=True, separator="."), leaf)  # noqa: E731
    nnx.update(model, jax.tree_util.tree_map_with_path(place_leaf, nnx.state(model)))
    return model


def make_data_parallel(devices: list[Any], rows: int, kind: AxisType, block: Any, tokens: int) -> Case:
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,), devices=devices)
    model = place_model(block, lambda path, leaf: shard(leaf, mesh))
    x = jax.ShapeDtypeStruct((8 * rows, tokens, WIDTH), jnp.float32)
    return compute_loss, model, shard(x, mesh, "data")


def make_tensor_parallel(devices: list[Any], rows: int) -> Case:
    """Columns of the first products and rows of the last lie on two devices, the batch on four."""
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2, devices=devices)

    def place(path: str, leaf: Any) -> Any:
        if ".kernel" not in path:
            return shard(leaf, mesh)
        return shard(leaf, mesh, "model") if ".down" in path or ".out" in path else shard(leaf, mesh, None, "model")

    x = jax.ShapeDtypeStruct((4 * rows, 256, WIDTH), jnp.float32)
    return compute_loss, place_model(Attention, place), shard(x, mesh, "data")


def make_cases(devices: list[Any], rows: int) -> dict[str, Case]:
    return {
        "GPT, data 8": make_data_parallel(devices, rows, AxisType.Auto, Attention, 256),
        "GPT, data 4 x model 2": make_tensor_parallel(devices, rows),
        "gated MLP, data 8, Explicit": make_data_parallel(devices, rows, AxisType.Explicit, Gated, 512),
    }


def compute_ranks(values: np.ndarray) -> np.ndarray:
    """Return ranks, equal values with the mean of theirs."""
    below = (values[:, None] > values[None, :]).sum(axis=1)
    equal = (values[:, None] == values[None, :]).sum(axis=1)
    return below + (equal - 1) / 2


def choose_assignments(space: Space, count: int) -> list[int]:
    """Return the numbers of assignments spread evenly over the order of the predicted sizes."""
    order = np.argsort(space.bytes, kind="stable")
    return sorted({int(order[place]) for place in np.linspace(0, len(order) - 1, count).round().astype(int)})


def measure_rules(case: Case, rules: rt.Rules, target: rt.Target) -> rt.Measurement:
    fn, model, x = case
    with use_rules(model, rules):
        return rt.measure(fn, model, x, differentiate=True, target=target)


def compare_predictions(case: Case, target: rt.Target, count: int) -> tuple[float, float, np.ndarray]:
    """Return the rank correlation, the median relative error, and the compiled sizes in bytes per device."""
    fn, model, x = case
    space = Space(build_outline(fn, model, (x,), get_rates(target.name), target=target))
    numbers = choose_assignments(space, count)
    compiled = np.array(
        [measure_rules(case, write_rules(space, space.assignments[n]), target).temp_bytes for n in numbers]
    )
    predicted = space.bytes[numbers]
    correlation = float(np.corrcoef(compute_ranks(predicted), compute_ranks(compiled))[0, 1])
    return correlation, float(np.median(np.abs(predicted - compiled) / compiled)), compiled


def plan_budget(case: Case, target: rt.Target, share: float, least: int) -> str:
    """Return a table cell: the share reached and the compiles, or the minimum of all rules tried."""
    fn, model, x = case
    try:
        plan = rt.plan(fn, model, x, budget=share, of="temp", target=target)
    except rt.BudgetError:
        plain = measure_rules(case, rt.Rules(()), target).temp_bytes
        return f"out of reach: the least of the assignments is {least / plain:.2f}"
    plain = next(point.bytes for point in plan.points if not len(point.rules))
    return f"{plan.measured.temp_bytes / plain:.2f} in {len(plan.points)} compiles"


def measure_case(label: str, case: Case, target: rt.Target, options: argparse.Namespace) -> str:
    """Return a row of the table."""
    correlation, error, compiled = compare_predictions(case, target, options.assignments)
    cells = [] if options.no_budgets else [plan_budget(case, target, share, int(compiled.min())) for share in BUDGETS]
    sizes = f"{compiled.min() / 1e6:.1f} to {compiled.max() / 1e6:.1f}"
    return f"| {' | '.join([label, str(len(compiled)), sizes, f'{correlation:.3f}', f'{100 * error:.1f} %', *cells])} |"


def write_section(target: rt.Target, rows: list[str], options: argparse.Namespace) -> None:
    """Write one target's section of the page, and keep the others'."""
    packages = ["jax", "flax", *(["libtpu"] if target.platform == "tpu" else [])]
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    budgets = [] if options.no_budgets else list(map(str, BUDGETS))
    columns = ["model", "assignments", "compiled MB", "rank correlation", "median error", *budgets]
    table = [f"| {' | '.join(columns)} |", f"| --- |{' ---: |' * 4}{' --- |' * len(budgets)}", *rows]
    about = f"Measured {datetime.date.today()} with {versions}, {options.rows} rows for each part of the batch."
    sections = re.findall(r"^## (\S+)\n\n(.*?)(?=^## |\Z)", PAGE.read_text() if PAGE.exists() else "", re.M | re.S)
    bodies = {name: body.strip() for name, body in sections} | {target.name: "\n".join([about, "", *table])}
    PAGE.write_text(HEAD + "".join(f"\n## {name}\n\n{body}\n" for name, body in bodies.items()))


HEAD = f"""# Predictions and budgets on meshes

By `benchmarks/plan_meshes.py`: the gradient of a loss of {DEPTH} blocks of width {WIDTH} on 8 devices. The compiled
column has the smallest and the largest temporaries of the compiled assignments in MB on one device. Predictions are
those made before the first compile. Columns of budgets have what `plan` reaches for them, as shares of the plain
program's temporaries.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="cpu")
    parser.add_argument("--assignments", type=int, default=40)
    parser.add_argument("--rows", type=int, default=4, help="rows of the batch for each device of the data axis")
    parser.add_argument("--no-budgets", action="store_true", help="compare predictions only")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    target = rt.find_target(options.target)
    devices = list(target.devices)[:8] if target.platform != "cpu" else jax.devices("cpu")[:8]
    rows = []
    for label, case in make_cases(devices, options.rows).items():
        rows.append(measure_case(label, case, target, options))
        print(rows[-1], flush=True)
    if options.write:
        write_section(target, rows, options)


if __name__ == "__main__":
    main()
