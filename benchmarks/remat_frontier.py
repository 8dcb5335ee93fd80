# SPDX-License-Identifier: Apache-2.0
"""Compare plans with the named policies of several libraries, with the TPU compiler.

For each model of `remat_subjects.py`: its frontier, compiled once; then, for each named
policy, the plan with that policy's temporaries and the plan with that policy's cycles;
then ten budgets between the minimum and the plain model. `remat_baseline.py` says what
to install. A compile takes one to five minutes on two cores; cached compiles take no
time, so an interrupted run can be resumed.

    python benchmarks/remat_frontier.py --cache measured --out docs/benchmarks
"""

import argparse
import dataclasses
import datetime
import importlib.metadata
import pathlib
import sys
import tempfile
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import remat_subjects as subjects
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

import remattools as rt
from remattools.compiler.cache import Cache

# This close to the plain model's time, a plan need not have fewer cycles, only no more.
NEAR_PLAIN = 1.01
BUDGETS = 10
TITLES = {
    "llama": "Llama-3.2-1B, 4 layers",
    "qwen": "Qwen3-0.6B, 2 layers",
    "vit": "vision transformer",
    "resnet": "ResNet",
}


@dataclasses.dataclass(frozen=True)
class Fresh(Cache):
    """A new cache for the planner that does not know earlier searches, yet recompiles nothing measured before."""

    earlier: Cache

    def get(self, key: str) -> rt.Measurement | None:
        found = self.earlier.get(key)
        if found is not None:  # records of the search itself are read from the new directory only
            super().put(key, found)
        return found

    def put(self, key: str, measurement: rt.Measurement) -> None:
        super().put(key, measurement)
        self.earlier.put(key, measurement)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One policy and the plans that beat it, None where none does; `later` if the curve alone does not beat it."""

    name: str
    policy: rt.Measurement
    faster: rt.Measurement | None
    smaller: rt.Measurement | None
    later: bool = False

    def verdict(self, plain_cycles: int, least_temp: int) -> tuple[bool, bool]:
        """Return whether there are fewer cycles within its memory, and less memory within its cycles."""
        if not self.policy.fits:  # it has no time, and any plan that fits needs less memory
            return self.faster is not None, self.faster is not None
        cycles, size = self.policy.estimated_cycles or 0, self.policy.temp_bytes
        lenient = size == least_temp or cycles <= NEAR_PLAIN * plain_cycles
        return (
            self.faster is not None and (self.faster.estimated_cycles or 0) < cycles + lenient,
            self.smaller is not None and self.smaller.temp_bytes < size + lenient,
        )


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def answer(ask: Callable[[], rt.Plan]) -> rt.Measurement | None:
    try:
        return ask().measured
    except rt.BudgetError:
        return None


def measured_policies(subject: subjects.Subject, cache: Cache) -> dict[str, rt.Measurement]:
    """Compile each policy and return its measurement."""
    found = {}
    for name, rules in subjects.policies(subject).items():
        say(name)
        model = rt.apply(subject.build(), rules)
        found[name] = rt.measure(
            subject.loss, model, *subject.batch, target=subjects.TARGET, differentiate=True, cache=cache
        )
    return found


def least_temp(policies: Iterable[rt.Measurement]) -> int:
    """Return the temporaries of the policy that needs the least memory."""
    return min(policy.temp_bytes for policy in policies if policy.fits)


def rows_of(subject: subjects.Subject, curve: rt.Frontier, cache: Cache, args: argparse.Namespace) -> list[Row]:
    """Return all policies, each with the plan for its memory and the plan for its time.

    Where the curve has no better point, new plans are made for that memory and for that time. They start with what this
    run has compiled, and all of them together are compared with such policies.
    """

    def ask(plan: Callable[..., Any], **wanted: int) -> Any:
        return plan(
            subject.loss,
            subject.build(),
            *subject.batch,
            of="temp",
            target=subjects.TARGET,
            cache=cache,
            progress=say,
            **wanted,
        )

    policies = measured_policies(subject, cache)
    plain = int(curve.points[0].cycles)
    least = least_temp(policies.values())

    def row_of(name: str, found: rt.Frontier) -> Row:
        policy = policies[name]
        size, cycles = policy.temp_bytes, policy.estimated_cycles
        return Row(
            name=name,
            policy=policy,
            faster=answer(lambda: found.plan(size)),
            smaller=answer(lambda: found.plan(max_cycles=cycles)) if policy.fits else None,
            later=found is not curve,
        )

    known, unbeaten = curve, [name for name in policies if not all(row_of(name, curve).verdict(plain, least))]
    for name in unbeaten:
        policy = policies[name]
        for which, wanted in enumerate(({"budget": policy.temp_bytes}, {"max_cycles": policy.estimated_cycles})):
            if not row_of(name, known).verdict(plain, least)[which]:
                answer(lambda wanted=wanted: ask(rt.plan, max_compiles=args.max_compiles, **wanted))
                known = ask(rt.frontier, max_compiles=2)  # what the run has compiled so far, and nothing else
    return [row_of(name, known if name in unbeaten else curve) for name in policies]


def count_met_budgets(subject: subjects.Subject, found: rt.Frontier, cache: Cache) -> int:
    """Count how many of ten budgets are met, by a new compile of the plan's rules, with no faster point within them."""
    met = 0
    for budget in np.linspace(found.least_bytes, found.plain_bytes, BUDGETS).astype(int):
        plan = found.plan(int(budget))
        model = rt.apply(subject.build(), plan.rules) if len(plan.rules) else subject.build()
        again = rt.measure(subject.loss, model, *subject.batch, target=subjects.TARGET, differentiate=True, cache=cache)
        fastest = min(point.cycles for point in found.points if point.bytes <= budget)
        met += again.temp_bytes <= budget and (again.estimated_cycles or 0) <= fastest
    return met


def format_measurement(measured: rt.Measurement | None) -> str:
    if measured is None:
        return " | |"
    cycles = f"{(measured.estimated_cycles or 0) / 1e6:.2f}" if measured.fits else "out of memory"
    return f"{measured.temp_bytes / 1e6:,.1f} | {cycles} |"


def draw(panels: dict[str, tuple[rt.Frontier, list[Row]]], path: pathlib.Path) -> None:
    """Plot named policies and the curve of plans of each model, cycles against temporaries."""
    drawing = Figure(figsize=(9, 6.5), layout="constrained")
    FigureCanvasAgg(drawing)
    for axes, (title, (found, rows)) in zip(drawing.subplots(2, 2, squeeze=False).flat, panels.items(), strict=False):
        policies = [row.policy for row in rows if row.policy.fits]
        plans = [(p.bytes / 1e6, p.cycles / 1e6) for p in found.best]
        # Plans for one policy's memory or time, where the curve had no better point.
        own = [m for row in rows if row.later for m in (row.faster, row.smaller) if m is not None]
        axes.step(*zip(*plans, strict=True), where="post", color="tab:blue", marker="o", label="plans, one curve")
        for measured, style, label in (
            (own, {"marker": "s", "color": "tab:blue", "fillstyle": "none"}, "plans for one policy's memory or time"),
            (policies, {"marker": "x", "color": "tab:orange"}, "named policies"),
        ):
            if measured:
                sizes = [m.temp_bytes / 1e6 for m in measured]
                axes.plot(sizes, [(m.estimated_cycles or 0) / 1e6 for m in measured], ls="", label=label, **style)
        axes.set_title(title, fontsize=9, loc="left")
        axes.set_xlabel("temporaries, MB", fontsize=8)
        axes.set_ylabel("estimated cycles, millions", fontsize=8)
        axes.legend(fontsize=7)
    drawing.savefig(path, metadata={"Date": None})


def section(subject: subjects.Subject, args: argparse.Namespace, cache: Cache) -> tuple[str, rt.Frontier, list[Row]]:
    """Return one model's section of the page, its curve and its policies."""
    found = rt.frontier(
        subject.loss,
        subject.build(),
        *subject.batch,
        of="temp",
        target=subjects.TARGET,
        max_compiles=args.max_compiles,
        cache=cache,
        progress=say,
    )
    say(str(found))
    rows = rows_of(subject, found, cache, args)
    met = count_met_budgets(subject, found, cache)
    plain = int(found.points[0].cycles)
    least = least_temp(row.policy for row in rows)
    words = {(True, True): "yes", (True, False): "cycles only", (False, True): "memory only", (False, False): "**no**"}
    curve = "\n".join(f"| {p.bytes / 1e6:,.1f} | {p.cycles / 1e6:.2f} |" for p in found.best)
    table = "\n".join(
        f"| {row.name} | {' '.join(map(format_measurement, (row.policy, row.faster, row.smaller)))} "
        f"{words[row.verdict(plain, least)]}{', beyond the curve' if row.later else ''} |"
        for row in rows
    )
    reached = sum(all(row.verdict(plain, least)) for row in rows)
    text = f"""## {subject.what}

{len(found.points)} compiled points; {met} of {BUDGETS} budgets met, with no faster point within them; {reached} of
{len(rows)} policies beaten in cycles and in memory, {sum(not row.later for row in rows)} of them by the curve.
The curve:

| temp MB | M cycles |
| ---: | ---: |
{curve}

| policy | temp MB | M cycles | plan for its memory: MB | M cycles | plan for its time: MB | M cycles | better |
| --- | ---: | ---: | ---: | ---: | ---: | ---: | --- |
{table}
"""
    return text, found, rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=pathlib.Path, required=True, help="cache directory")
    parser.add_argument("--out", type=pathlib.Path, help="write the page here")
    parser.add_argument("--max-compiles", type=int, default=8, help="points of each curve, and compiles of each plan")
    parser.add_argument("--only", nargs="*", choices=subjects.SUBJECTS, default=list(subjects.SUBJECTS))
    args = parser.parse_args()
    versions = ", ".join(
        f"{name} {importlib.metadata.version(name)}" for name in ("jax", "flax", "libtpu", "google-tunix")
    )
    page = f"""# Plans against named policies

Measured {datetime.date.today().isoformat()} with {versions}, by `benchmarks/remat_frontier.py`: the gradient of a mean
logsumexp, compiled for one chip of `{subjects.TARGET}`. Bytes and cycles are the TPU compiler's (MB = 10^6 bytes);
no program was run. For each policy, the plan with at most its temporaries must need fewer cycles, and the plan with at
most its cycles less memory (no more, for the policy of least memory and for those within 1 % of the plain time).
MaxText's presets and torchtitan's list are translated to the names that the same values have here; tunix's DECODER is
`nothing_saveable` on every block. Policies that offload are not compared. Plans come from one curve, which started
without a cache. Where it has no better point, plans of {args.max_compiles} compiles each are made for that policy's
memory and time, starting with everything compiled before for that model; the last column says so.

![Named policies and plans: estimated cycles against temporaries](remat_frontier.svg)

"""
    with tempfile.TemporaryDirectory() as directory:
        cache = Fresh(pathlib.Path(directory), earlier=Cache(args.cache))
        found = {name: section(subjects.SUBJECTS[name](), args, cache) for name in args.only}
    page += "\n".join(text for text, _, _ in found.values())
    print(page)
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        draw({TITLES[name]: (curve, rows) for name, (_, curve, rows) in found.items()}, args.out / "remat_frontier.svg")
        (args.out / "remat_frontier.md").write_text(page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
