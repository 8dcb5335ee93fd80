# SPDX-License-Identifier: Apache-2.0
"""Plans against everybody's named policies, by the TPU's own compiler.

For each model of `remat_subjects.py`: its frontier, compiled once; then, for each named
policy, the plan with that policy's temporaries and the plan with that policy's cycles;
then ten budgets between the least and the plain model. What to install is said in
`remat_baseline.py`. A compile takes one to five minutes on two cores; those in the
cache take none, so that a run that was cut off goes on where it was.

    python benchmarks/remat_frontier.py --cache measured --out docs/benchmarks
    python benchmarks/remat_frontier.py --cache measured --stored-only
"""

import argparse
import dataclasses
import datetime
import importlib.metadata
import pathlib
import sys
from collections.abc import Callable, Iterable

import numpy as np
import remat_subjects as subjects
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

import remattools as rt
from remattools.measure.cache import Cache

# Bars: no more rather than fewer cycles is enough this near to the plain model's time.
NEAR_PLAIN = 1.01
BUDGETS = 10
TITLES = {
    "llama": "Llama-3.2-1B, 4 layers",
    "qwen": "Qwen3-0.6B, 2 layers",
    "vit": "vision transformer",
    "resnet": "ResNet",
}


class Stored(Cache):
    """Nothing is compiled: what is missing is said to be."""

    def get(self, key: str) -> rt.Measurement | None:
        found = super().get(key)
        if found is None:
            raise LookupError(key)
        return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One policy and the plans that answer it; None where it was not compiled."""

    name: str
    policy: rt.Measurement | None
    faster: rt.Measurement | None = None
    smaller: rt.Measurement | None = None
    aimed: bool = False

    def verdict(self, plain_cycles: int, least_temp: int) -> str:
        """Whether both bars are reached."""
        if self.policy is None:
            return "not compiled"
        if not self.policy.fits:
            return "yes: it does not fit" if self.faster is not None else "**no**"
        cycles = self.policy.estimated_cycles or 0
        lenient = self.policy.temp_bytes == least_temp or cycles <= NEAR_PLAIN * plain_cycles
        fewer = self.faster is not None and (
            (self.faster.estimated_cycles or 0) <= cycles if lenient else (self.faster.estimated_cycles or 0) < cycles
        )
        less = self.smaller is not None and (
            self.smaller.temp_bytes <= self.policy.temp_bytes
            if lenient
            else self.smaller.temp_bytes < self.policy.temp_bytes
        )
        return {(True, True): "yes", (True, False): "cycles only", (False, True): "memory only"}.get(
            (fewer, less), "**no**"
        )


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def answer(ask: Callable[[], rt.Plan]) -> rt.Measurement | None:
    try:
        return ask().measured
    except rt.BudgetError:
        return None


def measured_policies(subject: subjects.Subject, cache: Cache) -> dict[str, rt.Measurement | None]:
    """What the compiler says of each policy; None where it was not compiled."""
    found: dict[str, rt.Measurement | None] = {}
    for name, rules in subjects.policies(subject).items():
        say(name)
        try:
            model = rt.apply(subject.build(), rules)
            found[name] = rt.measure(
                subject.loss, model, *subject.batch, target=subjects.TARGET, differentiate=True, cache=cache
            )
        except LookupError:
            found[name] = None
    return found


def least_temp(policies: Iterable[rt.Measurement | None]) -> int:
    """The temporaries of the policy that takes least."""
    return min(policy.temp_bytes for policy in policies if policy is not None and policy.fits)


def rows_of(subject: subjects.Subject, found: rt.Frontier, cache: Cache, args: argparse.Namespace) -> list[Row]:
    """All policies, each with the plan of its memory and the plan of its time.

    What the frontier has no better point for is planned anew for that memory or that time.
    """

    def plan_for(**wanted: int) -> rt.Plan:
        return rt.plan(
            subject.loss,
            subject.build(),
            *subject.batch,
            of="temp",
            target=subjects.TARGET,
            max_compiles=args.aimed,
            cache=args.cache,
            progress=say,
            **wanted,
        )

    policies = measured_policies(subject, cache)
    least = least_temp(policies.values())
    rows = []
    for name, policy in policies.items():
        if policy is None:
            rows.append(Row(name=name, policy=None))
            continue
        size, cycles = policy.temp_bytes, policy.estimated_cycles
        row = Row(
            name=name,
            policy=policy,
            faster=answer(lambda size=size: found.plan(size)),
            smaller=answer(lambda cycles=cycles: found.plan(max_cycles=cycles)) if policy.fits else None,
        )
        if (
            args.aimed
            and not args.stored_only
            and not row.verdict(int(found.points[0].cycles), least).startswith("yes")
        ):
            row = dataclasses.replace(
                row,
                faster=answer(lambda size=size: plan_for(budget=size)) or row.faster,
                smaller=answer(lambda cycles=cycles: plan_for(max_cycles=cycles)) or row.smaller,
                aimed=True,
            )
        rows.append(row)
    return rows


def budgets_kept(subject: subjects.Subject, found: rt.Frontier, cache: Cache) -> int:
    """How many of ten budgets are kept by what the compiler says of the plan's rules, none of the points faster."""
    kept = 0
    for budget in np.linspace(found.least_bytes, found.plain_bytes, BUDGETS).astype(int):
        plan = found.plan(int(budget))
        model = rt.apply(subject.build(), plan.rules) if len(plan.rules) else subject.build()
        again = rt.measure(subject.loss, model, *subject.batch, target=subjects.TARGET, differentiate=True, cache=cache)
        fastest = min(point.cycles for point in found.points if point.bytes <= budget)
        kept += again.temp_bytes <= budget and (again.estimated_cycles or 0) <= fastest
    return kept


def figures(measured: rt.Measurement | None) -> str:
    if measured is None:
        return " | |"
    cycles = f"{(measured.estimated_cycles or 0) / 1e6:.2f}" if measured.fits else "does not fit"
    return f"{measured.temp_bytes / 1e6:,.1f} | {cycles} |"


def draw(panels: dict[str, tuple[rt.Frontier, list[Row]]], path: pathlib.Path) -> None:
    """Named policies and the curve of plans of each model, cycles against temporaries."""
    drawing = Figure(figsize=(9, 6.5), layout="constrained")
    FigureCanvasAgg(drawing)
    for axes, (title, (found, rows)) in zip(drawing.subplots(2, 2, squeeze=False).flat, panels.items(), strict=False):
        policies = [row.policy for row in rows if row.policy is not None and row.policy.fits]
        plans = [(p.bytes / 1e6, p.cycles / 1e6) for p in found.best]
        # Plans of a policy's own memory or time, where the curve had no better one.
        own = [m for row in rows if row.aimed for m in (row.faster, row.smaller) if m is not None]
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
    """One model's part of the page, its curve and its policies."""
    found = rt.frontier(
        subject.loss,
        subject.build(),
        *subject.batch,
        of="temp",
        target=subjects.TARGET,
        max_compiles=args.max_compiles,
        time_limit_s=0.0 if args.stored_only else None,
        cache=args.cache,
        progress=say,
    )
    say(str(found))
    rows = rows_of(subject, found, cache, args)
    kept = budgets_kept(subject, found, cache)
    plain = int(found.points[0].cycles)
    least = least_temp(row.policy for row in rows)
    curve = "\n".join(f"| {p.bytes / 1e6:,.1f} | {p.cycles / 1e6:.2f} |" for p in found.best)
    table = "\n".join(
        f"| {row.name} | {figures(row.policy)} {figures(row.faster)} {figures(row.smaller)} "
        f"{row.verdict(plain, least)}{', by a plan of its own' if row.aimed else ''} |"
        for row in rows
    )
    compiled = [row for row in rows if row.policy is not None]
    reached = sum(row.verdict(plain, least).startswith("yes") for row in compiled)
    text = f"""## {subject.what}

{len(found.points)} compiled points; {kept} of {BUDGETS} budgets kept with no point within them faster; {reached} of
{len(compiled)} compiled policies ({len(rows)} named) answered by fewer cycles and by less memory. The frontier:

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
    parser.add_argument("--cache", type=pathlib.Path, required=True, help="folder of earlier measurements")
    parser.add_argument("--out", type=pathlib.Path, help="write the page here")
    parser.add_argument("--max-compiles", type=int, default=8, help="points of each frontier")
    parser.add_argument(
        "--aimed", type=int, default=4, help="compiles of a plan for a policy the frontier does not beat"
    )
    parser.add_argument("--stored-only", action="store_true", help="compile nothing; say what is missing")
    parser.add_argument("--only", nargs="*", choices=subjects.SUBJECTS, default=list(subjects.SUBJECTS))
    args = parser.parse_args()
    cache = (Stored if args.stored_only else Cache)(args.cache)
    versions = ", ".join(
        f"{name} {importlib.metadata.version(name)}" for name in ("jax", "flax", "libtpu", "google-tunix")
    )
    page = f"""# Plans against named policies

Measured {datetime.date.today().isoformat()} with {versions}, by `benchmarks/remat_frontier.py`: the gradient of a mean
logsumexp, compiled for one chip of `{subjects.TARGET}`. Bytes and cycles are the TPU compiler's own (MB = 10^6 bytes);
no program was run. For each policy the plan with at most its temporaries has to take fewer cycles, and the plan with at
most its cycles less memory (no more, for the policy of least memory and for those within 1 % of the plain time).
MaxText's presets and torchtitan's list are given by the names that the same values have here; tunix's DECODER is
`nothing_saveable` on every block. Policies that offload are not compared. Plans come from the frontier; where it has no
better point, the plan is made anew for that policy's memory or time, which the last column says.

![Named policies and plans: estimated cycles against temporaries](remat_frontier.svg)

"""
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
