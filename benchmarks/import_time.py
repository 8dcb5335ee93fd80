# SPDX-License-Identifier: Apache-2.0
"""Measure import times: CPU seconds of new interpreters, beside flax.nnx.

    python benchmarks/import_time.py [--rounds 9] [--write]

Takes CPU time of the child process instead of wall-clock time, and the minimum over the rounds, because other load only
adds time. `--write` writes docs/benchmarks/import_time.md.
"""

import argparse
import datetime
import importlib.metadata
import pathlib
import platform
import resource
import subprocess
import sys

PAGE = pathlib.Path(__file__).parents[1] / "docs" / "benchmarks" / "import_time.md"
MODULES = ("flax.nnx", "remattools", "ckpttools")


def cpu_seconds(module: str) -> float:
    """Return the CPU seconds of a new interpreter that imports `module` and exits."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", f"import {module}"], check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    """Measure, print and, with `--write`, write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    seconds: dict[str, list[float]] = {module: [] for module in MODULES}
    for number in range(args.rounds + 1):
        for module in MODULES:
            taken = cpu_seconds(module)
            if number:  # the first round fills the disk cache and the bytecode cache
                seconds[module].append(taken)
    fastest = {module: min(taken) for module, taken in seconds.items()}
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "flax", "orbax-checkpoint"))
    lines = [
        "# Import time",
        "",
        f"{datetime.date.today()}, {versions}, Python {platform.python_version()}; `python benchmarks/import_time.py "
        f"--write`. CPU seconds of a new interpreter, the minimum of {args.rounds} alternating rounds.",
        "",
        "| import | CPU s | ratio to flax.nnx | goal |",
        "| --- | ---: | ---: | --- |",
        *(
            f"| {module} | {taken:.2f} | {taken / fastest['flax.nnx']:.3f} | "
            f"{'at most 1.1' if module == 'remattools' else ''} |"
            for module, taken in fastest.items()
        ),
    ]
    text = "\n".join(lines) + "\n"
    print(text)
    if args.write:
        PAGE.write_text(text)


if __name__ == "__main__":
    main()
