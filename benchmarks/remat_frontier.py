# SPDX-License-Identifier: Apache-2.0
"""Plans against named policies, by the TPU's own compiler.

For each of the policies in `remat_baseline.py`: the plan whose budget is that policy's
temporaries. The model, the target and what to install are the same. A compile of
this model takes one to five minutes; those in the cache take none.

    python benchmarks/remat_frontier.py --cache measured --out docs/benchmarks
    python benchmarks/remat_frontier.py --cache measured --budget-mb 3206
"""

import argparse
import pathlib
import sys

import jax
import jax.numpy as jnp
import remat_baseline as baseline

import remattools as rt


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=pathlib.Path, required=True, help="folder of earlier measurements")
    parser.add_argument("--out", type=pathlib.Path, help="write the page here")
    parser.add_argument("--max-compiles", type=int, default=8)
    parser.add_argument("--budget-mb", type=float, nargs="*", help="these budgets, rather than the policies'")
    args = parser.parse_args()
    model, tokens = baseline.build(), jax.ShapeDtypeStruct((1, baseline.TOKENS), jnp.int32)

    def planned(budget: int) -> tuple[int, int, int]:
        found = rt.plan(
            baseline.loss,
            model,
            tokens,
            budget=budget,
            of="temp",
            target=baseline.TARGET,
            max_compiles=args.max_compiles,
            cache=args.cache,
            progress=say,
        )
        say(f"{found}\n{found.to_toml()}")
        return found.measured.temp_bytes, found.measured.estimated_cycles or 0, len(found.points)

    wanted: dict[str, tuple[int, int]] = {f"{mb} MB": (int(mb * 1e6), 0) for mb in args.budget_mb or ()}
    if not wanted:
        named = rt.compare(
            baseline.loss,
            model,
            tokens,
            candidates=baseline.candidates(model),
            target=baseline.TARGET,
            differentiate=True,
            cache=args.cache,
            progress=lambda name, number, count: say(f"{number + 1}/{count} {name}"),
        )
        wanted = {row.name: (row.measurement.temp_bytes, row.measurement.estimated_cycles or 0) for row in named.rows}
    lines = [
        "| policy | temp MB | M cycles | plan's temp MB | plan's M cycles | compiles |",
        "| --- | " + "---: | " * 5,
    ]
    for name, (size, cycles) in wanted.items():
        try:
            ours = planned(size)
        except rt.BudgetError as error:
            say(str(error))
            lines.append(f"| {name} | {size / 1e6:,.0f} | {cycles / 1e6:.1f} | not reached | | |")
            continue
        row = f"| {name} | {size / 1e6:,.0f} | {cycles / 1e6:.1f} |"
        lines.append(f"{row} {ours[0] / 1e6:,.0f} | {ours[1] / 1e6:.1f} | {ours[2]} |")
    page = "\n".join(lines) + "\n"
    print(page)
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "remat_frontier.md").write_text(f"# Plans against named policies\n\n{page}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
