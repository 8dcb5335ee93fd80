# SPDX-License-Identifier: Apache-2.0
"""Compare blocks in groups with one region per block, with the TPU compiler: a deep model of light blocks.

python benchmarks/remat_groups.py --write docs/benchmarks/remat_groups.md
"""

import argparse
import datetime
import importlib.metadata
import pathlib

import jax
import jax.numpy as jnp
from flax import nnx

import remattools as rt

TARGET, DEPTH, WIDTH, ROWS = "tpu:v5e:2x2", 24, 256, 8192


class Light(nnx.Module):
    """One product: its backward pass needs little besides the block's input."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.norm, self.up = nnx.LayerNorm(WIDTH, rngs=rngs), nnx.Linear(WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return x + jax.nn.gelu(self.up(self.norm(x)))


class Tower(nnx.Module):
    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.layers = nnx.List([Light(rngs) for _ in range(DEPTH)])

    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in self.layers:
            x = layer(x)
        return x


def loss(model: nnx.Module, x: jax.Array) -> jax.Array:
    return jnp.mean(model(x) ** 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", type=pathlib.Path, help="write the page here")
    parser.add_argument("--cache", type=pathlib.Path, help="cache directory")
    args = parser.parse_args()
    model, x = nnx.eval_shape(Tower), jax.ShapeDtypeStruct((ROWS, WIDTH), jnp.float32)
    by_hand = {
        "plain": None,
        "every layer, nothing saved": {"layers.*": "nothing_saveable"},
        "every layer, dots_saveable": {"layers.*": "dots_saveable"},
    }
    named = rt.compare(loss, model, x, candidates=by_hand, target=TARGET, differentiate=True, cache=args.cache)
    found = rt.frontier(loss, model, x, of="temp", target=TARGET, cache=args.cache, progress=print)
    rows = [
        f"| {name} | {named[name].temp_bytes / 1e6:,.1f} | {(named[name].estimated_cycles or 0) / 1e6:.2f} |"
        for name in by_hand
    ]
    for point in found.best:
        what = "; ".join(
            f"`{pattern.text}`: {len(action.save)} names" + (f", groups of {action.group}" if action.group != 1 else "")
            for pattern, action in point.rules
        )
        rows.append(f"| **plan**: {what or 'plain'} | {point.bytes / 1e6:,.1f} | {point.cycles / 1e6:.2f} |")
    table = "\n".join(rows)
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "flax", "libtpu"))
    page = f"""# Groups of blocks in plans

Measured {datetime.date.today().isoformat()} with {versions}, by `benchmarks/remat_groups.py`: {DEPTH} blocks of a
norm, one product and a GELU (float32, {ROWS:,} rows of {WIDTH}), compiled for one chip of `{TARGET}`. With one region
per block, the input of every block is saved; a group saves one input for all of its blocks. The plans are the
frontier of one search of {len(found.points)} compiles.

| rules | temp MB | M cycles |
| --- | ---: | ---: |
{table}
"""
    print(page)
    if args.write is not None:
        args.write.write_text(page)


if __name__ == "__main__":
    main()
