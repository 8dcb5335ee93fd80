# SPDX-License-Identifier: Apache-2.0
"""Interrupt the calls of a session at random moments, and count what is left wrong.

    python benchmarks/ckpt_interrupts.py [--trials 2000] [--control 200] [--python PATH ...] [--jobs 2] [--write]

Each trial is one run with one interrupt (`tests/ckpttools/behaviour/interrupts.py` says which and what is checked).
The control waits for saves with `Thread.join`. `--python` names further interpreters that have the dependencies;
`--write` writes docs/benchmarks/ckpt_interrupts.md.
"""

import argparse
import collections
import concurrent.futures
import datetime
import json
import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[1]
PAGE = ROOT / "docs" / "benchmarks" / "ckpt_interrupts.md"
CHUNK = 100


def run(python: str, trials: int, first_seed: int, *options: str) -> dict:
    """Run trials in processes of their own, so that one that hangs costs no others; return the sums."""
    total: dict = {"trials": 0, "raised": 0, "failures": [], "places": collections.Counter()}
    for number, begin in enumerate(range(0, trials, CHUNK)):
        count = min(CHUNK, trials - begin)
        command = [python, "-m", "tests.ckpttools.behaviour.interrupts", str(count), str(first_seed + number), *options]
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
        ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
        if ended.returncode:
            total["failures"].append(f"process of seed {first_seed + number} ended: {ended.stderr[-2000:]}")
            continue
        found = json.loads(ended.stdout)
        for key in ("trials", "raised", "failures"):
            total[key] += found[key]
        print(*found["failures"], sep="\n", end="", flush=True)
        total["places"].update(found["places"])
        print(f"{python} {options}: {total['trials']} trials, {len(total['failures'])} failures", flush=True)
    return total


def describe_python(python: str) -> str:
    code = (
        "import platform, importlib.metadata as m; print(', '.join([f'Python {platform.python_version()}', "
        "*(f'{n} {m.version(n)}' for n in ('jax', 'flax', 'orbax-checkpoint'))]))"
    )
    return subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=2000)
    parser.add_argument("--control", type=int, default=200)
    parser.add_argument("--python", nargs="*", default=[])
    parser.add_argument("--jobs", type=int, default=1, help="how many interpreters run at a time")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    variants: list[tuple[str, str, int, tuple[str, ...]]] = [
        (python, "", options.trials, ()) for python in (sys.executable, *options.python)
    ]
    variants.insert(1, (sys.executable, ", waiting with `Thread.join` (the control)", options.control, ("--control",)))
    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        seeds = [100 * (number + 1) for number in range(len(variants))]
        sums = pool.map(lambda seed, each: run(each[0], each[2], seed, *each[3]), seeds, variants)
        results = list(zip(variants, sums, strict=True))
    rows, details = [], []
    for (python, name, _, _), found in results:
        versions = describe_python(python)
        rows.append(f"| {versions}{name} | {found['trials']} | {found['raised']} | {len(found['failures'])} |")
        places = ", ".join(f"`{place}` {count}" for place, count in found["places"].most_common(12))
        details.append(f"- {versions}{name}: interrupted in {places}.")
        details += [f"    - failure: {failure.splitlines()[0][:300]}" for failure in found["failures"][:10]]
    page = "\n".join(
        [
            "# Interrupts",
            "",
            f"{datetime.date.today()}; `python benchmarks/ckpt_interrupts.py --write`. Each trial is a run of six",
            "steps with saves in the background or blocking, waits and restores of earlier steps, of which one call is",
            "interrupted: in half of the trials by an exception at a random trace event of the calling thread (any",
            "bytecode of this package and of `threading`, any function call elsewhere), in the other half by a signal",
            "handler that raises after a random time. The program then changes its arrays in place and goes on. A",
            "failure is a step with wrong values, a damaged or lost step, a step under a wrong number, a lock that is",
            "never released, or a call that hangs for a minute.",
            "",
            "| | trials | interrupted inside a call | failures |",
            "| --- | ---: | ---: | ---: |",
            *rows,
            "",
            *details,
            "",
        ]
    )
    print(page)
    if options.write:
        PAGE.write_text(page)


if __name__ == "__main__":
    main()
