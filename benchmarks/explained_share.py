# SPDX-License-Identifier: Apache-2.0
"""How much of the compiler's temporaries the live buffers at the peak account for: 26 programs.

python benchmarks/explained_share.py --write docs/benchmarks/explained_share.md

The models of `remat_subjects` need tunix.
"""

import argparse
import dataclasses
import datetime
import importlib.metadata
import itertools
import os
import pathlib
from collections.abc import Iterator
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import jax
import jax.numpy as jnp
import optax
import remat_subjects
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

import remattools as rt

CPU, TPU = "cpu", "tpu:v5e:2x2"
WIDTH, HEADS, DEPTH, VOCABULARY = 256, 4, 3, 2048


class Block(nnx.Module):
    """Attention and an MLP, each with dropout."""

    def __init__(self, rngs: nnx.Rngs, dropout: float) -> None:
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.qkv, self.out = nnx.Linear(WIDTH, 3 * WIDTH, rngs=rngs), nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.up, self.down = nnx.Linear(WIDTH, 4 * WIDTH, rngs=rngs), nnx.Linear(4 * WIDTH, WIDTH, rngs=rngs)
        self.drop = nnx.Dropout(dropout, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        rows, tokens, _ = x.shape
        parts = self.qkv(self.norm(x)).reshape(rows, tokens, 3, HEADS, WIDTH // HEADS)
        scores = jnp.einsum("bqhd,bkhd->bhqk", parts[:, :, 0], parts[:, :, 1])
        weights = self.drop(jax.nn.softmax(scores, axis=-1))
        x = x + self.out(jnp.einsum("bhqk,bkhd->bqhd", weights, parts[:, :, 2]).reshape(x.shape))
        return x + self.drop(self.down(jax.nn.gelu(self.up(x))))


class GPT(nnx.Module):
    """A small decoder without a mask; its blocks are a list, or stacked and run by a scan."""

    def __init__(self, *, dropout: float = 0.0, scan: bool = False) -> None:
        rngs = nnx.Rngs(0)
        self.embed = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs)
        self.scan = scan
        if scan:
            self.layers = nnx.vmap(lambda r: Block(r, dropout), in_axes=0)(rngs.split(DEPTH))
        else:
            self.layers = nnx.List([Block(rngs, dropout) for _ in range(DEPTH)])

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = self.embed(tokens)
        if self.scan:
            x = nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.layers)
        else:
            for layer in self.layers:
                x = layer(x)
        return self.embed.attend(x)


def loss(model: GPT, tokens: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(model(tokens), tokens).mean()


@nnx.jit(donate_argnums=(0, 1))
def step(model: GPT, optimizer: nnx.Optimizer, tokens: jax.Array) -> jax.Array:
    value, gradients = nnx.value_and_grad(loss)(model, tokens)
    optimizer.update(model, gradients)
    return value


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """One program to measure.

    Attributes:
        target: What it is compiled for.
        rules: Rules of its blocks; None for the plain model.
        dropout: Rate of the dropout.
        scan: Whether the blocks are run by a scan.
        whole_step: Measure a jitted, donated optimizer step instead of the gradient.
        mesh: Shape of the mesh over "data" and "model"; None for one device.
    """

    target: str
    rules: Any = None
    dropout: float = 0.0
    scan: bool = False
    whole_step: bool = False
    mesh: tuple[int, int] | None = None


_NOTHING = {"layers.*": "nothing_saveable"}
PROGRAMS = {
    f"{title}, {target}": dataclasses.replace(program, target=target)
    for target in (CPU, TPU)
    for title, program in {
        "plain": Program(target=CPU),
        "nothing saved": Program(target=CPU, rules=_NOTHING),
        "dropout": Program(target=CPU, dropout=0.1),
        "dropout, nothing saved": Program(target=CPU, dropout=0.1, rules=_NOTHING),
        "scan": Program(target=CPU, scan=True),
        "scan, nothing saved": Program(target=CPU, scan=True, rules={"layers": "nothing_saveable"}),
        "whole step, nothing saved": Program(target=CPU, whole_step=True, rules=_NOTHING),
        "mesh (4, 1)": Program(target=CPU, mesh=(4, 1)),
        "mesh (2, 2), nothing saved": Program(target=CPU, mesh=(2, 2), rules=_NOTHING),
    }.items()
}


def measure(program: Program, cache: pathlib.Path | None) -> rt.Measurement:
    """Return the measurement of one program."""
    rows, tokens = (16, 256) if program.target == CPU else (32, 512)
    target = rt.find_target(program.target)
    model = nnx.eval_shape(lambda: GPT(dropout=program.dropout, scan=program.scan))
    batch = jax.ShapeDtypeStruct((rows, tokens), jnp.int32)
    if program.mesh is not None:
        mesh = target.mesh(program.mesh, ("data", "model"))
        batch = jax.ShapeDtypeStruct(batch.shape, batch.dtype, sharding=NamedSharding(mesh, PartitionSpec("data")))
        _shard(model, mesh)
    if program.rules is not None:
        rt.apply(model, program.rules)
    if program.whole_step:
        optimizer = nnx.eval_shape(lambda model: nnx.Optimizer(model, optax.adamw(1e-3), wrt=nnx.Param), model)
        return rt.measure(step, model, optimizer, batch, target=target, cache=cache)
    return rt.measure(loss, model, batch, target=target, differentiate=True, cache=cache)


def measure_subjects(cache: pathlib.Path | None, only: str) -> Iterator[tuple[str, rt.Measurement]]:
    """Yield names and measurements of the models that plans are measured on, without rules and saving nothing."""
    for key, make_subject in remat_subjects.SUBJECTS.items():
        for suffix in ("", ", nothing saved"):
            name = f"{key}{suffix}, {remat_subjects.TARGET}"
            if only not in name:
                continue
            subject = make_subject()
            model = subject.build()
            if suffix:
                rt.apply(model, dict.fromkeys(subject.blocks, "nothing_saveable"))
            yield (
                name,
                rt.measure(
                    subject.loss, model, *subject.batch, target=remat_subjects.TARGET, differentiate=True, cache=cache
                ),
            )


def format_cells(measured: rt.Measurement) -> list[str]:
    """Return the cells of one row."""
    temp, live, between = measured.temp_bytes, measured.explained_bytes, measured.fragmentation_bytes
    largest = measured.live[0]
    return [
        f"{temp / 1e6:,.1f}",
        f"{live / 1e6:,.1f}",
        f"{between / 1e6:,.1f}",
        f"{100 * (1 - abs(temp - live) / temp):.1f} %",
        f"{100 * (measured.explained_share or 0):.1f} %",
        f"`{largest.path}` `{largest.operation}` {largest.shape} x{largest.count}",
    ]


def _shard(model: GPT, mesh: jax.sharding.Mesh) -> None:
    """Split every matrix over the mesh's second axis, and replicate the rest."""

    def place(leaf: Any) -> Any:
        spec = PartitionSpec(None, "model") if len(leaf.shape) == 2 else PartitionSpec()
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    nnx.update(model, jax.tree.map(place, nnx.state(model)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", type=pathlib.Path, help="write the page here")
    parser.add_argument("--cache", type=pathlib.Path, help="cache directory")
    parser.add_argument("--only", default="", help="only programs with this in their name")
    args = parser.parse_args()
    lines = []
    own = ((name, measure(program, args.cache)) for name, program in PROGRAMS.items() if args.only in name)
    for name, measured in itertools.chain(own, measure_subjects(args.cache, args.only)):
        lines.append(f"| {name} | {' | '.join(format_cells(measured))} |")
        print(lines[-1], flush=True)
    table = "\n".join(lines)
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "flax", "libtpu"))
    page = f"""# What the live buffers explain

Measured {datetime.date.today().isoformat()} with {versions}, by `benchmarks/explained_share.py`: a GPT of {DEPTH}
blocks of width {WIDTH}, its gradient or a whole adamw step; then the models that plans are measured on (Llama and Qwen
are tunix's, cut to 4 and 2 blocks). Live buffers are those at the peak of the compiled program.
"Between" is what the TPU compiler's temporaries take beyond its own peak: memory that lies unused between buffers. A
share is one minus the distance to `temp_bytes`, whether the buffers are too few or too many.

| program | temp MB | live buffers MB | between MB | share of buffers | with between | largest row |
| --- | ---: | ---: | ---: | ---: | ---: | --- |
{table}
"""
    if args.write is not None:
        args.write.write_text(page)


if __name__ == "__main__":
    main()
