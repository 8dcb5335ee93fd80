# SPDX-License-Identifier: Apache-2.0
"""Measure what a mirror costs and what it survives: speed to a directory and to S3 on loopback, and faults.

    python benchmarks/ckpt_mirror.py [--megabytes 256] [--trials 60] [--write]

The S3 server is moto's, a Python program on the same machine: the times say what copying costs the training, not how
fast a network is. `--write` writes docs/benchmarks/ckpt_mirror.md.
"""

import argparse
import collections
import datetime
import importlib.metadata
import os
import pathlib
import random
import shutil
import statistics
import sys
import tempfile
import time
import warnings

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("AWS_MAX_ATTEMPTS", "1")
os.environ.setdefault("AWS_EC2_METADATA_DISABLED", "true")
sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import jax
import jax.numpy as jnp
import numpy as np

import ckpttools as ct
from tests.ckpttools import stores

FAULTS = ("truncated", "flipped", "deleted", "no manifest", "cut while copying", "cut while restoring")


def mirror_at(place: str, way: stores.Way, scratch: pathlib.Path, name: str) -> ct.Mirror | None:
    if place == "none":
        return None
    if place == "directory":
        return ct.Mirror(str(scratch / "nas" / name), wait_s=300)
    options = {"endpoint_url": f"http://127.0.0.1:{way.port}"}
    return ct.Mirror(f"s3://bucket/{name}", options=options, wait_s=300)


def speed(megabytes: int, way: stores.Way, scratch: pathlib.Path) -> list[str]:
    """Measure the stall, the time until the copy is complete, and a restore from the mirror alone."""
    count = megabytes * (1 << 20) // 4 // 8
    state = {"model": {f"w{number}": jnp.arange(float(count)) + number for number in range(8)}}
    lines = [f"## Speed, a state of {megabytes} MB", ""]
    lines += ["| mirror | stall of a save | committed after | copied and read back after | restored from it in |"]
    lines += ["| --- | --- | --- | --- | --- |"]
    for place in ("none", "directory", "S3 on loopback"):
        directory = scratch / "speed"
        spec = ct.CheckpointSpec(directory=directory, mirror=mirror_at(place, way, scratch, "speed"))
        stalls, commits, copies = [], [], []
        with ct.open(spec) as ckpt:
            for step in range(1, 5):
                began = time.monotonic()
                ckpt.save(step, state)
                stalls.append(time.monotonic() - began)
                ckpt.wait()
                commits.append(time.monotonic() - began)
                while ckpt.mirror_status is not None and ckpt.mirror_status.pending:
                    time.sleep(0.01)
                copies.append(time.monotonic() - began)
        shutil.rmtree(directory)
        fetched = "-"
        if spec.mirror is not None:
            began = time.monotonic()
            with ct.open(spec) as ckpt:
                ckpt.restore(state)
            fetched = f"{time.monotonic() - began:.2f} s"
            shutil.rmtree(directory)
        copied = "-" if spec.mirror is None else f"{statistics.median(copies[1:]):.2f} s"
        middle = f"{statistics.median(stalls[1:]) * 1e3:.0f} ms | {statistics.median(commits[1:]):.2f} s"
        lines.append(f"| {place} | {middle} | {copied} | {fetched} |")
        print(lines[-1], flush=True)
    return lines


def small_state(step: int) -> dict:
    return {
        "model": {"w": jnp.arange(4096.0) + step, "b": jnp.arange(7.0) * step},
        "optimizer": {"mu": jnp.ones(5) * step},
    }


def trial(fault: str, s3: stores.S3, way: stores.Way, directory: pathlib.Path, rng: random.Random) -> str:
    """Cause one fault in the newest of three copies and return the outcome."""
    name = directory.name
    options = {"endpoint_url": f"http://127.0.0.1:{way.port}"}
    spec = ct.CheckpointSpec(directory=directory, mirror=ct.Mirror(f"s3://bucket/{name}", options=options, wait_s=30))
    with ct.open(spec) as ckpt:
        for step in (1, 2):
            ckpt.save(step, small_state(step))
            ckpt.wait()
    if fault == "cut while copying":
        way.bytes_left = rng.randrange(40_000)
    with ct.open(spec) as ckpt:
        ckpt.restore(small_state(0))
        ckpt.save(3, small_state(3))
    way.bytes_left, way.open = None, True
    if fault != "cut while copying":
        objects = s3.objects(f"{name}/3-").items()
        wanted = fault == "no manifest"
        keys = [key for key, size in objects if size and key.endswith("ckpttools.manifest") == wanted]
        key = rng.choice(keys)
        body = bytearray(s3.client.get_object(Bucket="bucket", Key=key)["Body"].read())
        if fault in ("deleted", "no manifest"):
            s3.client.delete_object(Bucket="bucket", Key=key)
        elif fault in ("truncated", "flipped"):
            body[rng.randrange(len(body))] ^= 1 << rng.randrange(8)
            body = body[: len(body) // 2] if fault == "truncated" else body
            s3.client.put_object(Bucket="bucket", Key=key, Body=bytes(body))
    shutil.rmtree(directory)
    if fault == "cut while restoring":
        way.bytes_left = rng.randrange(20_000)
    try:
        with ct.open(spec) as ckpt:
            report = ckpt.restore(small_state(0))
    except ct.MirrorError:
        report = None
    finally:
        way.bytes_left, way.open = None, True
    if report is None:
        return "refused, named"
    right = report.step and jax.tree.all(
        jax.tree.map(lambda a, b: bool(np.array_equal(a, b)), report.state, small_state(report.step))
    )
    if not right:
        return "WRONG"
    return "newest restored" if report.step == 3 else f"an older step restored{', named' if report.rejected else ''}"


def faults(trials: int, s3: stores.S3, way: stores.Way, scratch: pathlib.Path) -> list[str]:
    """Count outcomes by kind of fault; the local directory is deleted in each trial, so only the mirror is left."""
    rng, found = random.Random(5), {fault: collections.Counter() for fault in FAULTS}
    for number in range(trials):
        fault = FAULTS[number % len(FAULTS)]
        found[fault][trial(fault, s3, way, scratch / f"trial{number}", rng)] += 1
        if number % 12 == 11:
            print(f"fault {number + 1} of {trials}", flush=True)
    lines = [
        "## Faults",
        "",
        f"{trials} trials. Each has three steps and one fault; then the local directory is deleted and the run is "
        "restored.",
    ]
    lines += ["", "| fault | outcome |", "| --- | --- |"]
    for fault, outcomes in found.items():
        lines.append(f"| {fault} | " + ", ".join(f"{count} {name}" for name, count in sorted(outcomes.items())) + " |")
    wrong = sum(outcomes["WRONG"] for outcomes in found.values())
    return [*lines, "", f"Wrong values: {wrong}."]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=256)
    parser.add_argument("--trials", type=int, default=60)
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    os.environ.update(stores.USER)
    warnings.simplefilter("ignore")
    s3 = stores.S3()
    way = stores.Way(s3.port)
    with tempfile.TemporaryDirectory() as directory:
        scratch = pathlib.Path(directory)
        lines = [*speed(args.megabytes, way, scratch), "", *faults(args.trials, s3, way, scratch)]
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "orbax-checkpoint", "s3fs"))
    head = [
        f"# What a mirror costs and survives ({datetime.date.today()})",
        "",
        f"{os.cpu_count()} cores; {versions}.",
        "",
    ]
    text = "\n".join([*head, *lines]) + "\n"
    print(text)
    if args.write:
        (pathlib.Path(__file__).parents[1] / "docs" / "benchmarks" / "ckpt_mirror.md").write_text(text)


if __name__ == "__main__":
    main()
