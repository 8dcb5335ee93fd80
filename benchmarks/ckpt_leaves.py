# SPDX-License-Identifier: Apache-2.0
"""Time a save, a restore in place, a diff and the error of a mismatch for states of more and more small leaves.

    python benchmarks/ckpt_leaves.py [--leaves 1000 3000 12000 25000 50000] [--write]

Orbax saves and loads the same arrays with the same options beside each, so that the ratio does not depend on the
machine. Leaves are tiny: the time is that of their number, not of their bytes. `--write` writes
docs/benchmarks/ckpt_leaves.md.
"""

import argparse
import datetime
import importlib.metadata
import os
import pathlib
import sys
import tempfile
import time
from collections.abc import Callable

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import jax
import jax.numpy as jnp
from flax import nnx
from orbax.checkpoint import v1

import ckpttools as ct

COLUMNS = ["leaves", "Orbax save", "save", "Orbax load", "restore in place", "ratio", "us a leaf", "diff", "error"]


class Stack(nnx.Module):
    """A model of many layers of two leaves each."""

    def __init__(self, leaves: int, name: str = "layers") -> None:
        setattr(self, name, nnx.List([nnx.Dict(kernel=_make(), bias=_make()) for _ in range(leaves // 2)]))


def _make() -> nnx.Param:
    return nnx.Param(jnp.zeros(4))


def measure(function: Callable[[], object]) -> float:
    """Return the seconds of one call."""
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def make_context() -> v1.Context:
    """Return Orbax's options as ckpttools sets them."""
    context = v1.Context()
    context.array.saving.use_compression = False
    context.memory.deepcopy_host_arrays = False
    return context


def load_with_orbax(directory: pathlib.Path, model: Stack) -> None:
    """Restore a model in place as Orbax's guide for nnx does."""
    state = nnx.state(model)
    with make_context():
        loaded = v1.load_checkpointables(directory, {"model": jax.tree.map(lambda leaf: leaf, nnx.to_pure_dict(state))})
    nnx.replace_by_pure_dict(state, loaded["model"])
    nnx.update(model, state)


def refuse(directory: pathlib.Path, model: Stack) -> None:
    """Load a step that does not fit."""
    try:
        ct.load(directory, {"model": model})
    except ct.StructureError as error:
        str(error)
        return
    raise SystemExit("the step should not fit")


def measure_row(leaves: int) -> list[str]:
    """Return the cells of one row."""
    model = Stack(leaves)
    with tempfile.TemporaryDirectory(prefix="ckpt-leaves-") as scratch:
        plain, run = pathlib.Path(scratch) / "orbax", pathlib.Path(scratch) / "run"
        spec = ct.CheckpointSpec(directory=run, storage=ct.Storage(asynchronous=False), keep=ct.All())
        arrays = nnx.to_pure_dict(nnx.state(model))
        with make_context():
            plain_save_s = measure(lambda: v1.save_checkpointables(plain, {"model": arrays}))
        with ct.open(spec) as ckpt:
            save_s = measure(lambda: ckpt.save(1, {"model": model}))
            for leaf in jax.tree.leaves(nnx.state(model), is_leaf=lambda node: isinstance(node, nnx.Variable)):
                leaf.set_raw_value(leaf.get_raw_value() + 1)
            ckpt.save(2, {"model": model})
        plain_target, target = Stack(leaves), Stack(leaves)
        plain_load_s = measure(lambda: load_with_orbax(plain, plain_target))
        load_s = measure(lambda: ct.load(run, {"model": target}))
        diff_s = measure(lambda: str(ct.diff(run, run, steps=(1, 2))))
        other = Stack(leaves, "blocks")
        error_s = measure(lambda: refuse(run, other))
    seconds = [f"{value:.2f}" for value in (plain_save_s, save_s, plain_load_s, load_s)]
    ratio, each = load_s / plain_load_s, 1e6 * load_s / leaves
    return [f"{leaves:,}", *seconds, f"{ratio:.2f}", f"{each:.0f}", f"{diff_s:.2f}", f"{error_s:.2f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--leaves", type=int, nargs="+", default=[1000, 3000, 12_000, 25_000, 50_000])
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    measure_row(100)  # imports and first compilations are not part of the measurement
    lines = [f"| {' | '.join(COLUMNS)} |", "|" + " ---: |" * len(COLUMNS)]
    print("\n".join(lines), flush=True)
    for leaves in options.leaves:
        lines.append(f"| {' | '.join(measure_row(leaves))} |")
        print(lines[-1], flush=True)
    if options.write:
        versions = ", ".join(
            f"{name} {importlib.metadata.version(name)}" for name in ("jax", "flax", "orbax-checkpoint")
        )
        head = [f"# What the number of leaves costs ({datetime.date.today()})", "", f"{versions}; seconds, CPU.", ""]
        tail = [
            "",
            "`ratio` is the restore in place over Orbax's own load; a constant `us a leaf` is a linear restore.",
        ]
        tail += ["`error` is the refusal of a model whose list has another name, with its suggested surgery."]
        page = pathlib.Path(__file__).parents[1] / "docs" / "benchmarks" / "ckpt_leaves.md"
        page.write_text("\n".join([*head, *lines, *tail]) + "\n")


if __name__ == "__main__":
    main()
