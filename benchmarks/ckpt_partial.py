# SPDX-License-Identifier: Apache-2.0
"""Count the bytes that a partial restore reads out of a large uncompressed step, by the kernel's count.

    python benchmarks/ckpt_partial.py [--megabytes 500] [--write]

`rchar` of /proc/self/io counts every byte that a read call returns, from the disk or from the page cache. It does not
count mapped files, so a restore of everything is the control. `--write` writes docs/benchmarks/ckpt_partial.md.
"""

import argparse
import datetime
import importlib.metadata
import os
import pathlib
import sys
import tempfile
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import jax
import numpy as np

import ckpttools as ct

LEAF_BYTES = 5 << 20


def read_bytes() -> int:
    """Return the bytes that this process has read so far."""
    return int(pathlib.Path("/proc/self/io").read_text().split("rchar:")[1].split()[0])


def measure_load(directory: pathlib.Path, state: dict, **options: object) -> tuple[int, float]:
    """Run one load and return its bytes and seconds."""
    before, began = read_bytes(), time.perf_counter()
    ct.load(directory, state, **options)
    return read_bytes() - before, time.perf_counter() - began


def run(megabytes: int) -> list[str]:
    """Run all cases and return the table as Markdown lines."""
    count = max(1, (megabytes << 20) // LEAF_BYTES)
    rng = np.random.default_rng(0)
    shape = (LEAF_BYTES // 4 // 1024, 1024)
    state = {"model": {f"layer{n}": {"kernel": rng.standard_normal(shape, np.float32)} for n in range(count)}}
    with tempfile.TemporaryDirectory(prefix="ckpt-partial-") as scratch:
        directory = pathlib.Path(scratch) / "run"
        with ct.open(ct.CheckpointSpec(directory=directory, storage=ct.Storage(asynchronous=False))) as ckpt:
            total = ckpt.save(1, state).total_bytes
        template = jax.tree.map(np.zeros_like, state)
        renamed = {"model": {"first": template["model"]["layer7"]}}
        cases = [
            ("one leaf", template, {"only": "model.layer7"}),
            ("one leaf under a new name", renamed, {"only": "model.first", "surgery": ct.Rename("layer7", "first")}),
            ("five leaves", template, {"only": "model.layer{0,1,2,3,4}"}),
            ("everything", template, {}),
        ]
        ct.load(directory, template, only="model.layer0")  # imports are not part of the measurement
        lines = [f"A step of {count} leaves, {total / 1e6:.0f} MB.", ""]
        lines += ["| restored | bytes read | of the step | seconds |", "| --- | ---: | ---: | ---: |"]
        for name, state, options in cases:
            size, seconds = measure_load(directory, state, **options)
            lines.append(f"| {name} | {size:,} | {100 * size / total:.2f} % | {seconds:.2f} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=500)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    lines = run(options.megabytes)
    print("\n".join(lines))
    if options.write:
        versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "orbax-checkpoint"))
        head = [f"# What a partial restore reads ({datetime.date.today()})", "", f"{versions}.", ""]
        page = pathlib.Path(__file__).parents[1] / "docs" / "benchmarks" / "ckpt_partial.md"
        page.write_text("\n".join([*head, *lines]) + "\n")


if __name__ == "__main__":
    main()
