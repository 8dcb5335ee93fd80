# SPDX-License-Identifier: Apache-2.0
"""Everything in one run: rules on an unedited model, two kills, a bit-for-bit resume, a damaged checkpoint.

    python examples/demo.py [--json] [--functional] [--directory DIR]

Exits with 1 if the memory is not halved, the resumed run differs in one bit, or the damage is not detected.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from typing import Any

import jax
import numpy as np
from flax import nnx
from rich.console import Console
from train_charlm import CONFIG, build, update

import ckpttools as ct
import remattools as rt

SCRIPT = pathlib.Path(__file__).with_name("train_charlm.py")
console = Console(stderr=True, highlight=False)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print the results as JSON on standard output")
    parser.add_argument("--functional", action="store_true", help="train over nnx.split state")
    parser.add_argument("--directory", type=pathlib.Path, help="keep the runs here; default: a temporary directory")
    arguments = parser.parse_args()
    began = time.monotonic()
    directory = arguments.directory or pathlib.Path(tempfile.mkdtemp(prefix="charlm-"))
    try:
        results = run_all(directory, ["--functional"] if arguments.functional else [])
    finally:
        if arguments.directory is None:
            shutil.rmtree(directory, ignore_errors=True)
    results["seconds"] = round(time.monotonic() - began, 1)
    print(json.dumps(results, indent=2) if arguments.json else format_summary(results))
    return 0 if results["halved"] and results["resumed_bit_for_bit"] and results["recovery"]["found"] else 1


def run_all(directory: pathlib.Path, options: list[str]) -> dict[str, Any]:
    """Run all five parts and return the measurements as plain data."""
    console.rule("1. rules on an unedited model")
    memory = show_rules()
    console.rule("2. training, killed twice")
    kills = train_with_kills(directory / "killed", options, directory / "compiled")
    console.rule("3. resumed, to the end")
    resumed_from = finish(directory / "killed", options, directory / "compiled")
    console.rule("4. the same run without interruption")
    finish(directory / "uninterrupted", options, directory / "compiled")
    same = compare(directory / "killed", directory / "uninterrupted", functional=bool(options))
    console.print(f"compared {same['leaves']} arrays: {same['different'] or 'all equal'}")
    console.rule("5. one flipped bit")
    recovery = damage_and_recover(directory / "killed", functional=bool(options))
    halved = memory["ruled"]["temp_bytes"] <= memory["plain"]["temp_bytes"] / 2
    return {
        "memory": memory,
        "halved": halved,
        "kills": kills,
        "resumed_from": resumed_from,
        "compared_leaves": same["leaves"],
        "resumed_bit_for_bit": not same["different"],
        "recovery": recovery,
    }


def show_rules() -> dict[str, dict[str, float]]:
    """Print what the rules do, and compile the train step with and without them."""
    config = tomllib.loads(CONFIG.read_text())
    rules = rt.Rules.load(CONFIG)
    model, _, _ = build(config)
    console.print(str(rt.explain(model, rules)), soft_wrap=True)
    measurements = {"plain": measure_step(config, None), "ruled": measure_step(config, rules)}
    for name, row in measurements.items():
        console.print(
            f"{name}: temp {row['temp_bytes'] / 1e6:.1f} MB, peak {row['peak_bytes'] / 1e6:.1f} MB, "
            f"{row['flops'] / 1e9:.2f} Gflop"
        )
    return measurements


def measure_step(config: dict[str, Any], rules: rt.Rules | None) -> dict[str, float]:
    """Compile the train step and return its memory and flops."""
    model, optimizer, data = build(config)
    if rules is not None:
        rt.apply(model, rules)
    measured = rt.measure(nnx.jit(update), model, optimizer, next(data))
    assert measured.flops is not None  # the CPU compiler counts them
    return {"temp_bytes": measured.temp_bytes, "peak_bytes": measured.total_bytes, "flops": measured.flops}


def start(directory: pathlib.Path, options: list[str], cache: pathlib.Path) -> subprocess.Popen[bytes]:
    # Restarts find the compiled step in the cache on disk, as in a real job.
    environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(cache)}
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), "--directory", str(directory), *options], env=environment, stdout=sys.stderr
    )


def train_with_kills(directory: pathlib.Path, options: list[str], cache: pathlib.Path) -> list[str]:
    """Kill the training once in the middle of a save and once between two saves."""
    events = []
    while True:
        child = start(directory, options, cache)
        wait_for(child, lambda: list_steps(directory) and is_saving(directory))
        child.send_signal(signal.SIGKILL)
        child.wait()
        if is_saving(directory):  # else the save had ended before the signal arrived: try again
            break
    events.append(f"killed while a save was being written; committed: {list_steps(directory)}")
    console.print(events[-1])
    child = start(directory, options, cache)
    before = list_steps(directory)
    wait_for(child, lambda: list_steps(directory) != before and not is_saving(directory))
    child.send_signal(signal.SIGKILL)
    child.wait()
    events.append(f"killed between two saves; committed: {list_steps(directory)}")
    console.print(events[-1])
    return events


def wait_for(child: subprocess.Popen[bytes], condition: Any) -> None:
    while not condition():
        if child.poll() is not None:
            raise SystemExit(f"the training ended with {child.returncode} before it could be killed")
        time.sleep(0.0005)


def list_steps(directory: pathlib.Path) -> list[int]:
    """List the steps in a run's directory by name alone: cheap enough to call a thousand times a second."""
    return sorted(int(path.name) for path in directory.glob("[0-9]*"))


def is_saving(directory: pathlib.Path) -> bool:
    """Return whether the staging directory holds a half-written save."""
    return any((directory / ".ckpttools" / "staging").glob("*/*"))


def finish(directory: pathlib.Path, options: list[str], cache: pathlib.Path) -> int | None:
    """Run the training to its end and return the newest step from before."""
    before = max(list_steps(directory), default=None)
    child = start(directory, options, cache)
    if child.wait() != 0:
        raise SystemExit(f"the training failed with {child.returncode}")
    return before


def restore(directory: pathlib.Path, *, functional: bool) -> tuple[ct.RestoreReport, Any]:
    """Restore the newest intact step of a run into new objects."""
    model, optimizer, data = build(tomllib.loads(CONFIG.read_text()))
    spec = dataclasses.replace(ct.CheckpointSpec.load(CONFIG), directory=directory)
    template: dict[str, Any] = {"model": model, "optimizer": optimizer, "data": data}
    if functional:
        template = {"train": nnx.state((model, optimizer)), "data": data}
    with ct.open(spec) as ckpt:
        report = ckpt.restore(template)
    items = [report.state["train"]] if functional else [nnx.state(model), nnx.state(optimizer)]
    return report, (items, data.get_state())


def compare(first: pathlib.Path, second: pathlib.Path, *, functional: bool) -> dict[str, Any]:
    """Compare every parameter, optimizer moment, random counter and the data position, bit for bit."""
    (_, one), (_, two) = (restore(directory, functional=functional) for directory in (first, second))
    pairs = list(zip(jax.tree.leaves_with_path(one), jax.tree.leaves(two), strict=True))
    different = [jax.tree_util.keystr(path) for (path, a), b in pairs if get_bits(a) != get_bits(b)]
    return {"leaves": len(pairs), "different": different}


def get_bits(leaf: Any) -> tuple[Any, ...]:
    if isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    array = np.asarray(leaf)
    return array.dtype, array.shape, array.tobytes()


def damage_and_recover(directory: pathlib.Path, *, functional: bool) -> dict[str, Any]:
    """Flip one bit in the data of the newest checkpoint and restore."""
    newest = max(list_steps(directory))
    victim = max(
        (path for path in (directory / str(newest)).rglob("*") if path.is_file()), key=lambda p: p.stat().st_size
    )
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    report, _ = restore(directory, functional=functional)
    console.print(str(report))
    rejected = [candidate.as_dict() for candidate in report.rejected]
    found = bool(rejected) and rejected[0]["step"] == newest and report.step is not None and report.step < newest
    return {"damaged": newest, "used": report.step, "rejected": rejected, "found": found}


def format_summary(results: dict[str, Any]) -> str:
    plain, ruled = (results["memory"][name]["temp_bytes"] for name in ("plain", "ruled"))
    rejected = results["recovery"]["rejected"]
    leaves = ", ".join(rejected[0]["leaves"]) if rejected else "none"
    return "\n".join(
        [
            f"temporaries of the train step: {plain / 1e6:.1f} MB plain, {ruled / 1e6:.1f} MB under the rules "
            f"({ruled / plain:.2f} of plain)",
            *results["kills"],
            f"resumed from step {results['resumed_from']}",
            f"resumed bit for bit: {'yes' if results['resumed_bit_for_bit'] else 'no'}",
            f"damaged step {results['recovery']['damaged']}: leaf {leaves} rejected, "
            f"step {results['recovery']['used']} used",
            f"took {results['seconds']} s",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
