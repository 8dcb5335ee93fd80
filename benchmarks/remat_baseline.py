# SPDX-License-Identifier: Apache-2.0
"""Measure what named policies reach on a real model, with the TPU compiler.

tunix's Llama-3.2-1B cut to four layers, bfloat16, one sequence of 4,096 tokens, the
gradient of a mean logsumexp; one v5e chip. Needs no TPU, but libtpu, matplotlib and
tunix:

    pip install "nnx-checkpointing[tpu,plot]" wrapt tensorboardX jaxtyping tqdm huggingface_hub sentencepiece \
        pillow perfetto pandas safetensors
    pip install --no-deps google-tunix qwix google-metrax clu
    python benchmarks/remat_baseline.py --out docs/benchmarks
"""

import argparse
import dataclasses
import datetime
import importlib.metadata
import os
import pathlib
import sys

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
from flax import nnx
from tunix.models.llama3 import model as llama

import remattools as rt
from remattools.transform.naming.names import NamedValue

TOKENS, LAYERS, TARGET = 4096, 4, "tpu:v5e:2x2"


def build(remat: llama.RematConfig = llama.RematConfig.NONE) -> llama.Llama3:
    config = dataclasses.replace(llama.ModelConfig.llama3p2_1b(), num_layers=LAYERS, remat_config=remat)
    model = nnx.eval_shape(lambda: llama.Llama3(config, rngs=nnx.Rngs(0)))
    nnx.update(model, jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, jnp.bfloat16), nnx.state(model)))
    return model


def loss(model: llama.Llama3, tokens: jax.Array) -> jax.Array:
    positions = jnp.arange(TOKENS)[None]
    mask = jnp.tril(jnp.ones((1, TOKENS, TOKENS), jnp.bool_))
    logits, _ = model(tokens, positions, None, mask)
    return jax.nn.logsumexp(logits.astype(jnp.float32), axis=-1).mean()


def names_of_a_layer(model: llama.Llama3) -> list[NamedValue]:
    """Return the operations that a rule on `layers.*` can save by name, with their shapes."""
    shape = jax.ShapeDtypeStruct((1, TOKENS), jnp.int32)
    mask = jax.ShapeDtypeStruct((1, TOKENS, TOKENS), jnp.bool_)
    explained = rt.explain(model, {"layers.*": "nothing_saveable"}, names=True, args=(shape, shape, None, mask))
    layer = next(row for row in explained.rows if row.path == "layers.0")
    return [value for value in layer.values if value.kind == "op" and value.reachable]


def saving(values: list[NamedValue]) -> dict[str, rt.Remat]:
    return {"layers.*": rt.Remat(save=tuple(f"{value.label}[{value.index}]" for value in values))}


def candidates(model: llama.Llama3) -> dict[str, object]:
    values = names_of_a_layer(model)
    # query against key, in any order of dimensions
    scores = [v for v in values if any(sum(n == TOKENS for n in aval.shape) > 1 for aval in v.avals)]
    dots = [v for v in values if v.primitive == "dot_general" and v not in scores]
    width = model.config.embed_dim * TOKENS
    return {
        "none": None,
        "attention and MLP, nothing saved (tunix BLOCK)": {
            "layers.*.attn": "nothing_saveable",
            "layers.*.mlp": "nothing_saveable",
        },
        "every layer, nothing saved (tunix DECODER)": "nothing_saveable",
        "every layer, dots_saveable": "dots_saveable",
        "every layer, dots_with_no_batch_dims_saveable": "dots_with_no_batch_dims_saveable",
        "names: all but the (heads, T, T) values": saving([v for v in values if v not in scores]),
        "names: dots but (heads, T, T)": saving(dots),
        "names: dots of the model width only": saving([v for v in dots if v.avals[0].size == width]),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("docs/benchmarks"))
    parser.add_argument("--cache", type=pathlib.Path, help="cache directory")
    args = parser.parse_args()
    model, tokens = build(), jax.ShapeDtypeStruct((1, TOKENS), jnp.int32)
    result = rt.compare(
        loss,
        model,
        tokens,
        candidates=candidates(model),
        target=TARGET,
        differentiate=True,
        cache=args.cache,
        progress=lambda name, number, count: print(f"{number + 1}/{count} {name}", file=sys.stderr, flush=True),
    )
    args.out.mkdir(parents=True, exist_ok=True)
    result.plot(args.out / "remat_baseline.svg")
    (args.out / "remat_baseline.md").write_text(page(result))
    (args.out / "remat_baseline.csv").write_text(result.to_csv())
    print(result)
    return 0


def page(result: rt.Comparison) -> str:
    versions = ", ".join(
        f"{name} {importlib.metadata.version(name)}" for name in ("jax", "flax", "libtpu", "google-tunix")
    )
    rows = "\n".join(
        f"| {row.name} | {row.measurement.temp_bytes / 1e6:,.0f} | {row.memory_ratio:.3f} "
        f"| {(row.measurement.estimated_cycles or 0) / 1e6:.1f} | {row.time_ratio:.3f} "
        f"| {'yes' if row.frontier else ''} |"
        for row in result.rows
    )
    return f"""# What named policies reach

Measured {datetime.date.today().isoformat()} with {versions}, by `benchmarks/remat_baseline.py`.
tunix's Llama-3.2-1B cut to {LAYERS} layers, bfloat16, 1 x {TOKENS:,} tokens, gradient of a mean logsumexp, compiled
for one chip of `{TARGET}`. Bytes and cycles are the TPU compiler's (MB = 10^6 bytes).

| policy | temp MB | of none | M cycles | of none | frontier |
| --- | ---: | ---: | ---: | ---: | --- |
{rows}

![Estimated cycles against temporaries](remat_baseline.svg)
"""


if __name__ == "__main__":
    sys.exit(main())
