# SPDX-License-Identifier: Apache-2.0
"""Count what survives damaged files, kills, failing system calls and power cuts, beside plain Orbax where possible.

    python benchmarks/ckpt_faults.py [--trials 2000] [--kills 500] [--process-kills 20] [--calls 1]
                                     [--cuts 0 7 33] [--write]

strace, if installed, makes system calls fail. The power cut needs root: a file system on a loop device is copied N
seconds after the save was reported as finished, without any sync, and the copy is mounted as after a crash. `--write`
writes docs/benchmarks/ckpt_faults.md.
"""

import argparse
import collections
import contextlib
import datetime
import importlib.metadata
import os
import pathlib
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as v0

import ckpttools as ct
from tests.ckpttools.behaviour import faults, syscalls
from tests.ckpttools.processes import cluster

MEGABYTES = 64


def fault_table(trials: int, scratch: pathlib.Path) -> list[str]:
    """Count outcomes by kind of file and kind of damage; half of the trials are uncompressed, half compressed."""
    found: list[faults.Trial] = []
    for compression in (False, True):
        pristine = scratch / f"pristine-{compression}"
        faults.write_run(pristine, compression=compression)
        for trial in faults.trials(pristine, scratch / "work", count=trials // 2, seed=11):
            found.append(trial)
            if len(found) % 200 == 0:
                print(f"fault {len(found)} of {trials}", flush=True)
    totals = collections.Counter(trial.outcome for trial in found)
    lines = [
        "## Damaged files",
        "",
        f"{len(found)} trials, each with one damaged file in the newest of three steps, then a restore: "
        + ", ".join(f"{count} {outcome}" for outcome, count in sorted(totals.items()))
        + ". Detected: the damaged file or leaf is named and the previous step restored. Harmless: the newest step is "
        "restored bit for bit. Anything else would be a failure.",
        "",
        "| file | " + " | ".join(faults.KINDS) + " |",
        "| --- |" + " --- |" * len(faults.KINDS),
    ]
    counted = faults.tally(found)
    for name in sorted({name for name, _ in counted}):
        cells = [_format_cell(counted.get((name, kind), collections.Counter())) for kind in faults.KINDS]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def _format_cell(outcomes: collections.Counter) -> str:
    return ", ".join(f"{count} {outcome}" for outcome, count in sorted(outcomes.items())) or "no change"


def kill_table(kills: int) -> list[str]:
    """Send SIGKILL at random moments, to a process that may fork; then to one with a mirror."""
    lines = ["## Kills", ""]
    for title, count, options in (("one process", kills, []), ("with a mirror", kills // 2, ["mirrored"])):
        command = [sys.executable, "-W", "ignore", "-m", "tests.ckpttools.behaviour.killing", str(count), "2", *options]
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, cwd=pathlib.Path(__file__).parents[1]
        )
        lines.append(f"- {title}: " + "; ".join(done.stdout.splitlines()))
    return [*lines, ""]


def call_table(every: int, scratch: pathlib.Path) -> list[str]:
    """Make one system call of a background save fail; `every`: try every n-th entry of the plan."""
    plan = [(call, error, number) for call, error, numbers in syscalls.PLAN for number in numbers][::every]
    counted: dict[str, collections.Counter] = {}
    problems: list[str] = []
    for trial in syscalls.trials(scratch / "calls", iter(plan)):
        counted.setdefault(trial.name.rpartition(" ")[0], collections.Counter())[trial.outcome] += 1
        problems += trial.problems
    return [
        "## System calls that fail",
        "",
        f"{len(plan)} background saves. In each, the n-th call of one kind fails in every thread, including "
        f"TensorStore's; problems {len(problems)}. Failed: the next call of the session raised the error, and the "
        "earlier steps are unchanged. Saved: the call did not matter to the step, which was restored bit for bit. Not "
        "reached: there was no n-th call. In each trial the save after that succeeds.",
        "",
        "| call and error | failed | saved | not reached |",
        "| --- | --- | --- | --- |",
        *(
            f"| {name} | " + " | ".join(str(outcomes[kind]) for kind in ("failed", "saved", "not met")) + " |"
            for name, outcomes in counted.items()
        ),
        "",
    ]


def process_table(kills: int, scratch: pathlib.Path) -> list[str]:
    """Send SIGKILL to one of two processes of a run, verify the run, and continue it."""
    chance, waits, problems = random.Random(7), [], 0
    for number in range(kills):
        waits.append(cluster.kill_one(scratch, number % 2, chance))
        problems += not ct.verify(scratch / "killed").ok
        print(f"process kill {number + 1} of {kills}", flush=True)
    return [
        "## Kills of one process of two",
        "",
        f"- kills {kills}, of process 0 and process 1 in turn, each run restored from where the previous one was killed"
        f"; steps committed {cluster.latest(scratch / 'killed')}; problems {problems}",
        f"- the other process ended {statistics.median(waits):.1f} s after the kill (at most {max(waits):.1f} s; "
        "the benchmark treats a process as dead after 3 s of silence, the default is 20 s)",
        "",
    ]


def big_state(step: int) -> dict[str, jax.Array]:
    size = MEGABYTES * 1_000_000 // 4 // 8
    return {f"part{n}": jnp.full(size, float(step * 10 + n)) for n in range(8)}


def save_ours(directory: pathlib.Path) -> None:
    spec = ct.CheckpointSpec(directory=directory, keep=ct.Latest(1))
    with ct.open(spec) as ckpt:
        for step in (1, 2, 3, 4):
            ckpt.save(step, {"model": big_state(step)})
            ckpt.wait()


def check_ours(directory: pathlib.Path) -> str:
    with ct.open(ct.CheckpointSpec(directory=directory, keep=ct.Latest(1))) as ckpt:
        report = ckpt.restore({"model": big_state(0)})
    return _verdict(report.step, report.state["model"])


def save_orbax(directory: pathlib.Path) -> None:
    with v0.CheckpointManager(directory, options=v0.CheckpointManagerOptions(max_to_keep=1)) as manager:
        for step in (1, 2, 3, 4):
            manager.save(step, args=v0.args.StandardSave(big_state(step)))
            manager.wait_until_finished()


def check_orbax(directory: pathlib.Path) -> str:
    with v0.CheckpointManager(directory) as manager:
        step = manager.latest_step()
        return _verdict(step, manager.restore(step, args=v0.args.StandardRestore(big_state(0))))


def _verdict(step: int | None, state) -> str:
    if step is None:
        return "no step"
    same = all(np.array_equal(state[name], value) for name, value in big_state(step).items())
    return f"step {step} {'intact' if same else 'wrong'}"


@contextlib.contextmanager
def mounted(image: pathlib.Path, point: pathlib.Path) -> Iterator[pathlib.Path]:
    point.mkdir(exist_ok=True)
    subprocess.run(["mount", "-o", "loop", str(image), str(point)], check=True)
    try:
        yield point
    finally:
        subprocess.run(["umount", str(point)], check=True)


def power_cut(scratch: pathlib.Path, wait_s: int, save, check) -> str:
    """Save on a fresh file system, copy its image `wait_s` seconds later, and restore from the copy."""
    image, copy = scratch / "disk.img", scratch / "after-cut.img"
    with image.open("wb") as file:
        file.truncate(1 << 30)
    subprocess.run(["mkfs.ext4", "-q", str(image)], check=True)
    with mounted(image, scratch / "disk") as disk:
        os.sync()
        save(disk / "run")
        time.sleep(wait_s)
        shutil.copyfile(image, copy)
    try:
        with mounted(copy, scratch / "after-cut") as disk:
            return check(disk / "run")
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0][:90]}"


def cut_table(cuts: list[int], scratch: pathlib.Path) -> list[str]:
    lines = [
        "## Power cuts",
        "",
        f"Four saves of {MEGABYTES} MB with a retention of one step (ckpttools always keeps two), waiting for each "
        "save; the disk is cut off N seconds after the last one was reported as finished.",
        "",
        "| | " + " | ".join(f"{wait_s} s" for wait_s in cuts) + " |",
        "| --- |" + " --- |" * len(cuts),
    ]
    for name, save, check in (("ckpttools", save_ours, check_ours), ("Orbax v0", save_orbax, check_orbax)):
        cells = []
        for wait_s in cuts:
            cells.append(power_cut(scratch, wait_s, save, check))
            print(f"{name}, cut after {wait_s} s: {cells[-1]}", flush=True)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--trials", type=int, default=2000)
    parser.add_argument("--kills", type=int, default=500)
    parser.add_argument("--process-kills", type=int, default=20)
    parser.add_argument("--calls", type=int, default=1, help="every n-th system call; 0 for none")
    parser.add_argument("--cuts", type=int, nargs="*", default=[0, 7, 33])
    parser.add_argument("--write", action="store_true", help="write docs/benchmarks/ckpt_faults.md")
    args = parser.parse_args()
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "flax", "orbax-checkpoint"))
    lines = [
        "# Damage, kills and power cuts",
        "",
        f"{datetime.date.today()}, {versions}, Python {platform.python_version()}, CPU, {os.cpu_count()} cores; "
        "`python benchmarks/ckpt_faults.py --write`.",
        "",
    ]
    with tempfile.TemporaryDirectory(prefix="ckpt-faults-") as directory, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scratch = pathlib.Path(directory)
        lines += fault_table(args.trials, scratch) if args.trials else []
        lines += kill_table(args.kills) if args.kills else []
        lines += process_table(args.process_kills, scratch) if args.process_kills else []
        if args.calls and syscalls.can_trace():
            lines += call_table(args.calls, scratch)
        if args.cuts and os.geteuid() == 0:
            lines += cut_table(args.cuts, scratch)
    text = "\n".join(lines)
    print(text)
    if args.write:
        target = pathlib.Path(__file__).parents[1] / "docs" / "benchmarks" / "ckpt_faults.md"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)


if __name__ == "__main__":
    main()
