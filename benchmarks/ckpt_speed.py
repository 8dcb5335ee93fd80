# SPDX-License-Identifier: Apache-2.0
"""Time saves, stalls and restores beside plain Orbax, in one run, as ratios.

    python benchmarks/ckpt_speed.py [--megabytes 524] [--rounds 7] [--directory DIR] [--write]

Every variant is timed once in each round, so that a slow moment of the machine affects all of them; the results are
medians. The stall of a background save is what the training loop sees: the call, plus how much longer than usual
the next update takes, which donates the buffers that are being saved. `--write` writes docs/benchmarks/ckpt_speed.md.
"""

import argparse
import dataclasses
import datetime
import importlib.metadata
import os
import pathlib
import platform
import shutil
import statistics
import sys
import tempfile
import time
import warnings

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1

import ckpttools as ct
from tests.ckpttools.behaviour import memory
from tests.ckpttools.behaviour.memory import make_state, template_of, update

PARTS = 32


@dataclasses.dataclass
class Timings:
    """Seconds by variant, one entry per round."""

    by_way: dict[str, list[float]] = dataclasses.field(default_factory=dict)

    def add(self, way: str, seconds: float) -> None:
        self.by_way.setdefault(way, []).append(seconds)

    def median(self, way: str) -> float:
        return statistics.median(self.by_way[way])

    def best(self, way: str) -> float:
        return min(self.by_way[way])


def orbax_context(*, compression: bool) -> v1.Context:
    context = v1.Context()
    context.array.saving.use_compression = compression
    return context


def save_orbax(directory: pathlib.Path, state, *, compression: bool) -> float:
    began = time.perf_counter()
    with orbax_context(compression=compression):
        v1.save_checkpointables(directory, {"model": state})
    return time.perf_counter() - began


def save_orbax_synced(directory: pathlib.Path, state) -> float:
    """Save with Orbax uncompressed, then call the fsyncs that make the step as durable as ours."""
    began = time.perf_counter()
    with orbax_context(compression=False):
        v1.save_checkpointables(directory, {"model": state})
    for parent, _, names in os.walk(directory.parent):
        for path in [parent, *(os.path.join(parent, name) for name in names)]:
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
    return time.perf_counter() - began


def spec_for(directory: pathlib.Path, *, asynchronous: bool) -> ct.CheckpointSpec:
    return ct.CheckpointSpec(directory=directory, keep=ct.All(), storage=ct.Storage(asynchronous=asynchronous))


def save_ours(directory: pathlib.Path, state) -> float:
    with ct.open(spec_for(directory, asynchronous=False)) as ckpt:
        began = time.perf_counter()
        ckpt.save(1, {"model": state})
        return time.perf_counter() - began


def stall(state, begin, ended) -> tuple[dict, float]:
    """Start a background save and run one more update; return the state and the time lost against an update alone."""
    state = jax.block_until_ready(update(state))
    usual = []
    for _ in range(5):
        began = time.perf_counter()
        state = jax.block_until_ready(update(state))
        usual.append(time.perf_counter() - began)
    began = time.perf_counter()
    handle = begin(state)
    state = jax.block_until_ready(update(state))
    lost = time.perf_counter() - began - statistics.median(usual)
    ended(handle)
    return state, lost


def measure(args: argparse.Namespace) -> tuple[Timings, dict[str, str]]:
    root = pathlib.Path(tempfile.mkdtemp(prefix="ckpt-speed-", dir=args.directory))
    timings, facts = Timings(), {}
    state = make_state(args.megabytes, PARTS)
    template = template_of(state)
    session = ct.open(spec_for(root / "stall", asynchronous=True))
    step = 0
    try:
        # One save first, so that the reused buffers are mapped, as in all but the first save of a run.
        session.save(1, {"model": state})
        session.wait()
        for number in range(args.rounds):
            here = root / f"round{number}"
            here.mkdir()
            _save_all(timings, here, state, number)

            began = time.perf_counter()
            loaded = v1.load_checkpointables(here / "plain" / "1", {"model": template})
            jax.block_until_ready(loaded)
            timings.add("restore: Orbax, uncompressed", time.perf_counter() - began)
            del loaded
            with ct.open(spec_for(here / "ours", asynchronous=False)) as ckpt:
                began = time.perf_counter()
                report = ckpt.restore({"model": template})
                jax.block_until_ready(report.state)
                timings.add("restore: ckpttools, verified", time.perf_counter() - began)
            del report
            began = time.perf_counter()
            loaded = v1.load_checkpointables(here / "default" / "1", {"model": template})
            jax.block_until_ready(loaded)
            timings.add("restore: Orbax, default", time.perf_counter() - began)
            del loaded

            def begin_plain(current, here=here):
                with orbax_context(compression=False):
                    return v1.save_checkpointables_async(here / "async" / "1", {"model": current})

            state, lost = stall(state, begin_plain, lambda handle: handle.result())
            timings.add("stall: Orbax, uncompressed", lost)
            step = number + 2
            state, lost = stall(
                state, lambda current, step=step: session.save(step, {"model": current}), lambda _: session.wait()
            )
            timings.add("stall: ckpttools", lost)
            shutil.rmtree(here)
            shutil.rmtree(root / "stall" / str(step - 1))
            print(f"round {number + 1} of {args.rounds}", flush=True)
        held = _get_buffer_bytes(session) / _get_state_bytes(state)
        facts["host memory held by background saves"] = f"{held:.2f} of the state"
    finally:
        session.close(raise_errors=False)
        shutil.rmtree(root, ignore_errors=True)
    facts |= peaks(args)
    facts["opening a run of 1,000 steps and finding the newest"] = f"{open_thousand(args.directory):.2f} s"
    return timings, facts


def _save_all(timings: Timings, here: pathlib.Path, state, number: int) -> None:
    """Save once with each variant, starting with another one in each round: a disk is slower after a large write."""
    ways = [
        ("save: Orbax, uncompressed", lambda: save_orbax(here / "plain" / "1", state, compression=False)),
        ("save: ckpttools", lambda: save_ours(here / "ours", state)),
        ("save: Orbax, default", lambda: save_orbax(here / "default" / "1", state, compression=True)),
        ("save: Orbax, uncompressed, then fsync", lambda: save_orbax_synced(here / "synced" / "1", state)),
    ]
    first = number % len(ways)
    for way, save in ways[first:] + ways[:first]:
        os.sync()
        timings.add(way, save())
    os.sync()


def _get_buffer_bytes(session: ct.Session) -> int:
    return sum(array.nbytes for array in session._saver.buffers.values())


def _get_state_bytes(state) -> int:
    return sum(np.asarray(x).nbytes for x in jax.tree.leaves(state))


def peaks(args: argparse.Namespace) -> dict[str, str]:
    """Measure each peak in a separate process: as is, and with an allocator that returns freed blocks at once."""
    found = {}
    for way in memory.WAYS:
        usual = memory.peak_of(way, args.megabytes, PARTS, args.directory)
        in_use = memory.peak_of(way, args.megabytes, PARTS, args.directory, **memory.GIVEN_BACK)
        found[f"peak memory, {way}"] = (
            f"{usual:.2f} states above the memory before; {in_use:.2f} if freed blocks are returned at once"
        )
    return found


def open_thousand(directory: str | None) -> float:
    """Return the seconds to open a run of 1,000 steps and restore a small state."""
    root = pathlib.Path(tempfile.mkdtemp(prefix="ckpt-thousand-", dir=directory))
    small = {"model": {"w": jnp.ones(4)}}
    try:
        with ct.open(spec_for(root, asynchronous=False)) as ckpt, warnings.catch_warnings():
            warnings.simplefilter("ignore", ct.CheckpointWarning)
            for step in range(1, 1001):
                ckpt.save(step, small)
        found = []
        for _ in range(5):
            began = time.perf_counter()
            with ct.open(spec_for(root, asynchronous=False)) as ckpt:
                ckpt.restore(small)
            found.append(time.perf_counter() - began)
        return min(found)
    finally:
        shutil.rmtree(root, ignore_errors=True)


RATIOS = (
    ("total save", "save: ckpttools", "save: Orbax, uncompressed", "at most 1.15"),
    ("total save", "save: ckpttools", "save: Orbax, default", "at most 0.55"),
    ("stall", "stall: ckpttools", "stall: Orbax, uncompressed", "at most 1.1"),
    ("restore", "restore: ckpttools, verified", "restore: Orbax, uncompressed", "at most 1.2"),
    ("restore", "restore: ckpttools, verified", "restore: Orbax, default", "below 1"),
)


def table(timings: Timings, facts: dict[str, str], args: argparse.Namespace) -> str:
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "flax", "orbax-checkpoint"))
    lines = [
        "# Speed of saving and restoring",
        "",
        f"{datetime.date.today()}, {versions}, Python {platform.python_version()}, CPU, {os.cpu_count()} cores, "
        f"{args.megabytes} MB of float32 normals in {PARTS} arrays, {args.rounds} rounds; "
        "`python benchmarks/ckpt_speed.py --write`.",
        "",
        "| | median s | best s |",
        "| --- | --- | --- |",
        *(f"| {way} | {timings.median(way):.3f} | {timings.best(way):.3f} |" for way in timings.by_way),
        "",
        "| ratio | of | to | goal | of medians | of bests | median of ratios per round |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        *(_ratio(timings, *row) for row in RATIOS),
        "",
        *(f"- {name}: {value}" for name, value in facts.items()),
        "",
    ]
    return "\n".join(lines)


def _ratio(timings: Timings, what: str, ours: str, theirs: str, goal: str) -> str:
    paired = statistics.median(a / b for a, b in zip(timings.by_way[ours], timings.by_way[theirs], strict=True))
    return (
        f"| {what} | {ours} | {theirs} | {goal} | {timings.median(ours) / timings.median(theirs):.2f} "
        f"| {timings.best(ours) / timings.best(theirs):.2f} | {paired:.2f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--megabytes", type=int, default=524)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--directory", help="where to write; a disk, not a memory file system")
    parser.add_argument("--write", action="store_true", help="write docs/benchmarks/ckpt_speed.md")
    args = parser.parse_args()
    text = table(*measure(args), args)
    print(text)
    if args.write:
        target = pathlib.Path(__file__).parents[1] / "docs" / "benchmarks" / "ckpt_speed.md"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)


if __name__ == "__main__":
    main()
