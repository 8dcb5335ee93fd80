# SPDX-License-Identifier: Apache-2.0
"""Measure the presets with the TPU compiler, against no rules and against saving nothing.

Each architecture of google-tunix has the shapes of its smallest published model, cut to two layers and 8,192 words so
that a compile takes a minute. `--write` writes the page, and the measurements into each preset's file.

    python benchmarks/remat_presets.py --cache measured --write
"""

import argparse
import dataclasses
import datetime
import importlib.metadata
import pathlib
import re
import sys
from typing import Any

import remat_subjects as subjects
from flax import nnx
from tunix.models.gemma import model as gemma
from tunix.models.gemma3 import model as gemma3
from tunix.models.gemma4 import model as gemma4
from tunix.models.llama3 import model as llama3
from tunix.models.qwen2 import model as qwen2
from tunix.models.qwen3 import model as qwen3

import remattools as rt

ROOT = pathlib.Path(__file__).parents[1]
FILES = ROOT / "remattools" / "rules" / "presets"
LAYERS, WORDS, TOKENS = 2, 8192, 1024
MARK = "# measured: "
# By preset: the published model, its class, its configuration.
SHAPES = {
    "llama3": ("Llama-3.2-1B", llama3.Llama3, llama3.ModelConfig.llama3p2_1b()),
    "qwen2": ("Qwen2.5-0.5B", qwen2.Qwen2, qwen2.ModelConfig.qwen2p5_0p5b()),
    "qwen3": ("Qwen3-0.6B", qwen3.Qwen3, qwen3.ModelConfig.qwen3_0p6b()),
    "gemma": ("Gemma-2B", gemma.Gemma, gemma.ModelConfig.gemma_2b()),
    "gemma3": ("Gemma3-270M", gemma3.Gemma3, gemma3.ModelConfig.gemma3_270m()),
    "gemma4": ("Gemma4-E2B", gemma4.Gemma4, gemma4.ModelConfig.gemma4_e2b()),
}


def subject(name: str) -> tuple[str, Any, Any, Any]:
    """Return the title, the abstract model in bfloat16, its loss and its batch."""
    title, cls, config = SHAPES[name]
    cut: dict[str, Any] = {"num_layers": LAYERS}
    for field in dataclasses.fields(config):
        if field.name in ("vocab_size", "num_embed"):
            cut[field.name] = WORDS
        elif field.name == "attention_types":
            cut[field.name] = tuple(config.attention_types)[:LAYERS]
        elif field.name == "frac_shared_layers":
            # With two layers, none may share the keys of an earlier one.
            cut[field.name] = 0.0
    config = dataclasses.replace(config, **cut)
    decoder = subjects.decoder(
        title, lambda: subjects.cast_to_bfloat16(nnx.eval_shape(lambda: cls(config, rngs=nnx.Rngs(0)))), TOKENS
    )
    return title, decoder.build(), decoder.loss, decoder.batch


def measure(name: str, args: argparse.Namespace) -> rt.Comparison:
    title, model, loss, batch = subject(name)
    print(name, title, file=sys.stderr, flush=True)
    candidates = {"no rules": None, "preset": rt.Rules.preset(name), "nothing saved": {"layers.*": "nothing_saveable"}}
    return rt.compare(
        loss, model, *batch, candidates=candidates, differentiate=True, target=subjects.TARGET, cache=args.cache
    )


def format_measurement(row: Any) -> str:
    measured = row.measurement
    return f"{measured.temp_bytes / 1e6:,.1f} MB, {(measured.estimated_cycles or 0) / 1e6:.2f} M cycles"


def format_note(name: str, found: rt.Comparison) -> str:
    """Format the comment with the measurements for a preset's file."""
    each = "; ".join(f"{row.name} {format_measurement(row)}" for row in found.rows)
    return (
        f"{MARK}{SHAPES[name][0]} cut to {LAYERS} layers and {WORDS:,} words, bfloat16, 1 x {TOKENS:,} tokens,\n"
        f"# {subjects.TARGET}, temporaries and estimated cycles of the gradient:\n# {each}\n"
    )


def write_note(name: str, found: rt.Comparison) -> None:
    path = FILES / f"{name}.toml"
    text = re.sub(rf"{MARK}.*\n(#.*\n)*", "", path.read_text())
    path.write_text(text.replace("\n\n[remat", f"\n{format_note(name, found)}\n[remat", 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=pathlib.Path, required=True, help="cache directory")
    parser.add_argument("--write", action="store_true", help="write docs/benchmarks/remat_presets.md and the files")
    parser.add_argument("--only", nargs="*", choices=SHAPES, default=list(SHAPES))
    args = parser.parse_args()
    versions = ", ".join(
        f"{name} {importlib.metadata.version(name)}" for name in ("jax", "flax", "libtpu", "google-tunix")
    )
    lines = [
        "# What the presets do",
        "",
        f"Measured {datetime.date.today().isoformat()} with {versions}, by `benchmarks/remat_presets.py`: the",
        f"gradient of a mean logsumexp, compiled for one chip of `{subjects.TARGET}`; {LAYERS} layers and {WORDS:,}",
        f"words of each model, bfloat16, 1 x {TOKENS:,} tokens. Bytes are temporaries. Bytes and cycles come from the",
        "compiler; nothing was run. The saving grows with the depth.",
        "",
        "| preset | shape | no rules | preset | nothing saved | share of the recomputation's cycles |",
        "| --- | --- | --- | --- | --- | ---: |",
    ]
    for name in args.only:
        found = measure(name, args)
        plain, preset, least = (row.measurement.estimated_cycles or 0 for row in found.rows)
        cells = " | ".join(format_measurement(row) for row in found.rows)
        lines.append(f"| `{name}` | {SHAPES[name][0]} | {cells} | {(preset - plain) / (least - plain):.0%} |")
        print(lines[-1], flush=True)
        if args.write:
            write_note(name, found)
    if args.write:
        (ROOT / "docs" / "benchmarks" / "remat_presets.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
