# SPDX-License-Identifier: Apache-2.0
"""Measure what a new interpreter takes to import each package and to run the commands that need no JAX.

    python benchmarks/import_time.py [--rounds 9] [--write]

Takes CPU time of the child process instead of wall-clock time, and the minimum over the rounds, because other load only
adds time. Both packages import their modules on first use, so "every name" is what a program pays that uses all of
them. `--write` writes docs/benchmarks/import_time.md.
"""

import argparse
import datetime
import importlib.metadata
import os
import pathlib
import platform
import resource
import subprocess
import sys
import tempfile

import ckpttools as ct

PAGE = pathlib.Path(__file__).parents[1] / "docs" / "benchmarks" / "import_time.md"
STEPS = 100
IMPORTS = {
    "import flax.nnx": "import flax.nnx",
    "import remattools": "import remattools",
    "import remattools, every name": "from remattools import *",
    "import ckpttools": "import ckpttools",
    "import ckpttools, every name": "from ckpttools import *",
}
GOALS = {
    "import remattools, every name": "at most 1.1 times flax.nnx",
    "ckpttools --help": "at most 0.6 s",
    f"ckpttools ls, {STEPS} steps": "at most 1 s",
}


def measure_cpu_seconds(arguments: list[str]) -> float:
    """Return the CPU seconds of a new interpreter with these arguments."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL, env=environment)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def write_run(directory: str) -> None:
    """Save `STEPS` steps of a small state."""
    spec = ct.CheckpointSpec(directory=directory, keep=ct.All(), storage=ct.Storage(asynchronous=False))
    with ct.open(spec) as ckpt:
        for step in range(1, STEPS + 1):
            ckpt.save(step, {"count": step}, metrics={"loss": 1 / step})


def main() -> None:
    """Measure, print and, with `--write`, write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        write_run(directory)
        programs = {name: ["-c", code] for name, code in IMPORTS.items()}
        programs["ckpttools --help"] = ["-m", "ckpttools", "--help"]
        programs[f"ckpttools ls, {STEPS} steps"] = ["-m", "ckpttools", "ls", directory]
        seconds: dict[str, list[float]] = {name: [] for name in programs}
        for number in range(args.rounds + 1):
            for name, arguments in programs.items():
                taken = measure_cpu_seconds(arguments)
                if number:  # the first round fills the disk cache and the bytecode cache
                    seconds[name].append(taken)
    fastest = {name: min(taken) for name, taken in seconds.items()}
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "flax", "orbax-checkpoint"))
    lines = [
        "# Import time",
        "",
        f"{datetime.date.today()}, {versions}, Python {platform.python_version()}; `python benchmarks/import_time.py "
        f"--write`. CPU seconds of a new interpreter, the minimum of {args.rounds} alternating rounds.",
        "",
        "| program | CPU s | ratio to flax.nnx | goal |",
        "| --- | ---: | ---: | --- |",
        *(
            f"| {name} | {taken:.2f} | {taken / fastest['import flax.nnx']:.3f} | {GOALS.get(name, '')} |"
            for name, taken in fastest.items()
        ),
    ]
    text = "\n".join(lines) + "\n"
    print(text)
    if args.write:
        PAGE.write_text(text)


if __name__ == "__main__":
    main()
