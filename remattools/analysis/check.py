# SPDX-License-Identifier: Apache-2.0
"""Did it work? What rules were to free, against what the compiler made of them.

Sits on `residuals`, `timeline`, `compile` and `transform.explain`. A rule can fail to
help without an error: the compiler merges the recomputation with the first
computation, an offload stays where it was, the saved values outweigh the freed ones,
one region lies in another or repeats it, or a graphdef was split off before the rules
came.
"""

import dataclasses
import os
from collections.abc import Callable, Iterator
from typing import Any, Literal

import jax
from jax.extend import core

from ..compiler.cache import Cache
from ..compiler.report import Measurement, format_bytes
from ..compiler.targets import Target, find_target
from ..jaxpr import jaxprs
from ..rules.paths import format_path
from ..rules.rule import Remat
from ..rules.ruleset import Rules
from ..tracing import pure_call
from ..tracing.origins import locate, select_loss_or_floats, trace_with_paths
from ..transform import apply as application
from ..transform import explain as explaining
from ..transform.modules import find_modules
from ..transform.naming import scopes
from .compare import find_model, make_rules, use_rules
from .measure import measure
from .residuals import linearize_call, make_report, residuals
from .timeline import make_timeline

_REGIONS_OFF = Rules({".": False, "**": False})
# Of what was to be freed, this share has to be gone from the compiled program; the compiler packs what remains.
_MIN_FREED_SHARE = 0.25
# Differences below this share of the plain program's temporaries are left to the compiler.
_NOISE = 0.02

FindingCode = Literal[
    "no_region", "nothing_freed", "no_lower_peak", "undone", "offload_ignored", "useless_rule", "repeated", "warning"
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finding:
    """Something that does not work as the rules say.

    Attributes:
        code: Which kind, for programs.
        message: What is wrong, and what to do.
    """

    code: FindingCode
    message: str


_NO_RULES_FINDINGS = (
    Finding(
        code="no_region",
        message="no rule is in force on the model, so nothing is rematerialised: check(..., rules=...), or apply some.",
    ),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckReport:
    """Planned against compiled; `str()` says it in lines.

    Attributes:
        target: What it was compiled for.
        residual_bytes: Computed residuals without and with the rules.
        planned_peak_bytes: Fullest moment of the walk over the program, without and with.
        temp_bytes: The compiler's temporaries, without and with.
        compiled_peak_bytes: The compiler's peak, without and with; tells of temporaries in a TPU's own memory, which
            `temp_bytes` leaves out.
        host_bytes: Residuals that the rules send to host memory.
        findings: What does not work; empty if all does.
    """

    target: str
    residual_bytes: tuple[int, int]
    planned_peak_bytes: tuple[int, int]
    temp_bytes: tuple[int, int]
    compiled_peak_bytes: tuple[int, int]
    host_bytes: int
    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing was found."""
        return not self.findings

    @property
    def _has_temporaries_in_peak(self) -> bool:
        return all(peak >= temp for peak, temp in zip(self.compiled_peak_bytes, self.temp_bytes, strict=True))

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {**dataclasses.asdict(self), "ok": self.ok}

    def __str__(self) -> str:
        lines = [f"{'':<22}{'plain':>12}{'with rules':>12}"]
        for label, (plain, ruled) in (
            ("residuals", self.residual_bytes),
            ("peak of the program", self.planned_peak_bytes),
            (f"temp on {self.target}", self.temp_bytes),
            (f"peak on {self.target}", self.compiled_peak_bytes),
        ):
            if label.startswith("peak on") and not self._has_temporaries_in_peak:
                continue
            lines.append(f"{label:<22}{format_bytes(plain):>12}{format_bytes(ruled):>12}")
        if self.host_bytes:
            lines.append(f"{'in host memory':<22}{'':>12}{format_bytes(self.host_bytes):>12}")
        lines += [f"{finding.code}: {finding.message}" for finding in self.findings]
        return "\n".join([*lines, "ok: the rules do what they say." if self.ok else ""]).rstrip()


def check(
    fn: Callable[..., Any],
    *args: Any,
    rules: Any = None,
    target: str | Target | jax.Device | None = None,
    cache: Cache | str | os.PathLike[str] | None = None,
) -> CheckReport:
    """Set what rules were to free against what the compiler made of them.

    Args:
        fn: A loss of a model and a batch (not yet a gradient), as in `residuals`.
        *args: Its arguments, real or abstract.
        rules: Rules in any form that `compare` takes; None checks what is in force on the model.
        target: As in `measure`.
        cache: As in `measure`.

    Returns:
        The figures, and what does not work.

    Raises:
        MeasureError: If there is no model, or nothing to differentiate.
        UnmatchedRuleError: If a rule matches nothing.
    """
    where = find_target(target)
    model = find_model(fn, args)
    planned = None if rules is None else make_rules(model, rules)
    with use_rules(model, _REGIONS_OFF):
        plain = _measure_memory(fn, args, where, cache)
    with use_rules(model, planned):
        ruled = _measure_memory(fn, args, where, cache)
        regions = list(_find_regions(_trace_jaxpr(fn, args)))
        in_force = any(application.get_active_actions(find_modules(model)))
        warnings = _collect_warnings(model)
    if in_force or regions:
        found = [*_find_problems(plain, ruled, len(regions), where), *_find_repeated_regions(regions), *warnings]
    else:
        found = [*_NO_RULES_FINDINGS, *warnings]
    if planned is not None and regions:
        found += _find_useless_rules(fn, args, model, planned)
    return CheckReport(
        target=where.name,
        residual_bytes=(plain.residual_bytes, ruled.residual_bytes),
        planned_peak_bytes=(plain.peak_bytes, ruled.peak_bytes),
        temp_bytes=(plain.measurement.temp_bytes, ruled.measurement.temp_bytes),
        compiled_peak_bytes=(plain.measurement.peak_bytes, ruled.measurement.peak_bytes),
        host_bytes=ruled.host_bytes,
        findings=tuple(found),
    )


@dataclasses.dataclass(frozen=True)
class _ProgramMemory:
    residual_bytes: int
    host_bytes: int
    peak_bytes: int
    measurement: Measurement


def _measure_memory(fn: Any, args: tuple[Any, ...], target: Target, cache: Any) -> _ProgramMemory:
    call = pure_call.stage(pure_call.unwrap_jit(fn), args)
    pure_call.check_differentiable(call)
    program, count = linearize_call(call)
    kept = make_report(call, program, count)
    return _ProgramMemory(
        kept.computed_bytes,
        kept.host_bytes,
        make_timeline(program, count).peak_bytes,
        measure(fn, *args, target=target, differentiate=True, cache=cache),
    )


def _find_problems(
    plain: _ProgramMemory, with_rules: _ProgramMemory, regions: int, target: Target
) -> Iterator[Finding]:
    if not regions:
        yield Finding(
            code="no_region",
            message="no region of the rules is in the program. The function does not run the model that the rules are "
            "on: split the graphdef (nnx.split) after remattools.apply, not before, and call the ruled methods.",
        )
        return
    if with_rules.residual_bytes >= plain.residual_bytes:
        yield Finding(
            code="nothing_freed",
            message=f"the rules keep {format_bytes(with_rules.residual_bytes)} from forward to backward, the plain model "
            f"{format_bytes(plain.residual_bytes)}: save less in the regions, or make them larger.",
        )
    intended = plain.peak_bytes - with_rules.peak_bytes
    on_chip = plain.measurement.temporaries_on_chip or with_rules.measurement.temporaries_on_chip
    memory = "peak" if on_chip else "temp"
    before = getattr(plain.measurement, f"{memory}_bytes")
    freed = before - getattr(with_rules.measurement, f"{memory}_bytes")
    less_kept = plain.residual_bytes - with_rules.residual_bytes
    compiled = plain.measurement.fits and with_rules.measurement.fits
    if compiled and intended > _NOISE * plain.peak_bytes and freed < _MIN_FREED_SHARE * intended:
        subject = "the peak" if on_chip else "the size of the temporaries"
        change = f"{'fell' if freed >= 0 else 'rose'} by {format_bytes(abs(freed))}"
        yield Finding(
            code="undone",
            message=f"the rules were to free {format_bytes(intended)} at the peak, but {subject} on {target.name} "
            f"{change}: the compiler undid the recomputation. Check that prevent_cse is not False outside of a scan, "
            "and that jax is at least 0.11.2 (older CPU compilers remove what keeps the two apart).",
        )
    elif compiled and less_kept > _NOISE * plain.residual_bytes and freed <= _NOISE * before:
        yield Finding(
            code="no_lower_peak",
            message=f"the rules keep {format_bytes(less_kept)} less from forward to backward, but the memory on "
            f"{target.name} is not lower: a region is recomputed as a whole and needs what it freed. Put the rules "
            "on smaller modules, such as the blocks instead of the model.",
        )
    if compiled and with_rules.host_bytes and not with_rules.measurement.host_temp_bytes:
        yield Finding(
            code="offload_ignored",
            message=f"{format_bytes(with_rules.host_bytes)} were to wait in host memory, but the program compiled for "
            f"{target.name} uses none of it: on this target offloading does nothing.",
        )


def _trace_jaxpr(fn: Any, args: tuple[Any, ...]) -> Any:
    return trace_with_paths(pure_call.stage(pure_call.unwrap_jit(fn), args), select_loss_or_floats)


@dataclasses.dataclass(frozen=True)
class _Region:
    """One region in a program; in one place, equal inputs and programs compute equal values."""

    path: str
    place: tuple[int, ...]  # equal blocks share a program, and so the variables in it
    inputs: tuple[Any, ...]
    jaxpr: Any


def _find_regions(jaxpr: Any, outer_stacks: tuple[str, ...] = (), place: tuple[int, ...] = ()) -> Iterator[_Region]:
    """Regions made by rules: their operations carry the mark, a hand-written `jax.checkpoint` carries none."""
    for number, equation in enumerate(jaxprs.open_jaxpr(jaxpr).eqns):
        stacks = (*outer_stacks, str(equation.source_info.name_stack))
        for index, (_, nested) in enumerate(jaxprs.find_subjaxprs(equation)):
            inner = jaxprs.open_jaxpr(nested)
            inside = [str(e.source_info.name_stack) for e in inner.eqns]
            marked = next((stack for stack in inside if scopes.REGION in stack), None)
            if jaxprs.is_region(equation) and marked is not None:
                path = locate([*stacks, marked])[1]
                inputs = tuple(atom if isinstance(atom, core.Var) else str(atom) for atom in equation.invars)
                yield _Region(format_path(path or ()), place, inputs, inner)
            yield from _find_regions(nested, stacks, (*place, number, index))


def _find_repeated_regions(regions: list[_Region]) -> Iterator[Finding]:
    """Regions that recompute what another one recomputes: called again with what they were called with."""
    groups: dict[tuple[Any, ...], list[_Region]] = {}
    for region in regions:
        groups.setdefault((region.place, region.inputs), []).append(region)
    for group in groups.values():
        same = [region for region in group if str(region.jaxpr) == str(group[0].jaxpr)]
        if len(same) > 1:
            yield Finding(
                code="repeated",
                message=f"{same[0].path} is called {len(same)} times on the same values, and each region computes them "
                "again on the way back: call it once and use the result again.",
            )


def _collect_warnings(model: Any) -> list[Finding]:
    notes: dict[str, list[str]] = {}
    for row in explaining.explain(model).rows:
        for warning in row.warnings:
            notes.setdefault(warning, []).append(row.path)
    return [
        Finding(
            code="warning", message=f"{paths[0]}{f' and {len(paths) - 1} more' if len(paths) > 1 else ''} {warning}"
        )
        for warning, paths in notes.items()
    ]


def _find_useless_rules(fn: Any, args: tuple[Any, ...], model: Any, rules: Rules) -> Iterator[Finding]:
    """Rules without which no more would be kept; a lone rule is judged by `nothing_freed`."""
    pairs = list(rules)
    remats = [number for number, (_, action) in enumerate(pairs) if isinstance(action, Remat)]
    if len(remats) < 2:
        return
    with use_rules(model, rules):
        kept = residuals(fn, *args).computed_bytes
    for number in remats:
        rest = Rules(pair for index, pair in enumerate(pairs) if index != number)
        with use_rules(model, rest):
            without = residuals(fn, *args).computed_bytes
        if without <= kept:
            yield Finding(
                code="useless_rule",
                message=f"the rule {pairs[number][0].text!r} frees nothing: {format_bytes(without)} are kept without "
                f"it, {format_bytes(kept)} with it. Its regions save at least what they free; take it out.",
            )
