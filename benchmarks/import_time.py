# SPDX-License-Identifier: Apache-2.0
"""What importing costs: CPU seconds of fresh interpreters, beside flax.nnx, in turns.

    python benchmarks/import_time.py [--rounds 9] [--write]

CPU time of the child process and not the clock's, and the least of the rounds, because other load only ever adds.
`--write` puts the table into docs/benchmarks/import_time.md.
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
    """CPU seconds of a fresh interpreter that imports `module` and ends."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", f"import {module}"], check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    """Measure, print and, if asked, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    seconds: dict[str, list[float]] = {module: [] for module in MODULES}
    for number in range(args.rounds + 1):
        for module in MODULES:
            taken = cpu_seconds(module)
            if number:  # the first round fills the caches of the disk and of bytecode
                seconds[module].append(taken)
    least = {module: min(taken) for module, taken in seconds.items()}
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "flax", "orbax-checkpoint"))
    lines = [
        "# Importing",
        "",
        f"{datetime.date.today()}, {versions}, Python {platform.python_version()}; `python benchmarks/import_time.py "
        f"--write`. CPU seconds of a fresh interpreter, the least of {args.rounds} rounds in turns.",
        "",
        "| import | CPU s | ratio to flax.nnx | goal |",
        "| --- | ---: | ---: | --- |",
        *(
            f"| {module} | {taken:.2f} | {taken / least['flax.nnx']:.3f} | "
            f"{'at most 1.1' if module == 'remattools' else ''} |"
            for module, taken in least.items()
        ),
    ]
    text = "\n".join(lines) + "\n"
    print(text)
    if args.write:
        PAGE.write_text(text)


if __name__ == "__main__":
    main()
