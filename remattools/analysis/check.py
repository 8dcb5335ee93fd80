# SPDX-License-Identifier: Apache-2.0
"""`check`: report whether rules free the memory they are meant to free.

Sits on `measure`, `residuals`, `timeline` and `transform.explain`. A rule can fail to help
without an error: the compiler merges the recomputation with the first computation, an
offload stays on the device, the saved values outweigh the freed ones, one region is inside
another or repeats it, or a graphdef was split off before the rules were applied.
"""

import dataclasses
import os
from collections.abc import Callable, Iterator
from typing import Any, Literal

import jax
from flax import nnx
from jax.extend import core

from ..compiler.cache import Cache
from ..compiler.partition import DeviceSizes, find_device_sizes
from ..compiler.report import Measurement
from ..compiler.targets import Target, find_target
from ..jaxpr import jaxprs
from ..rules.paths import format_path
from ..rules.rule import Remat
from ..rules.ruleset import Rules
from ..text import format_bytes, format_table
from ..tracing import pure_call
from ..tracing.origins import locate, select_loss_or_floats, trace_with_paths
from ..transform import apply as application
from ..transform import explain as explaining
from ..transform.author_regions import has_author_region
from ..transform.modules import find_modules
from ..transform.naming import scopes
from . import random_cost
from .explain_call import trace_call
from .measure import measure
from .offloads import IdleOffload, describe_idle_offload, find_idle_offloads, save_instead
from .residuals import linearize_call, make_report
from .ruled_call import find_model, make_rules, use_rules
from .timeline import make_timeline

_REGIONS_OFF = Rules({".": False, "**": False})
# The compiled program must free at least this share of what the traced one frees; the compiler packs the rest.
_MIN_FREED_SHARE = 0.25
# Differences below this share of the plain program's memory are the compiler's noise.
_NOISE = 0.02
_MAX_LIVE_ROWS = 3
# In the warning of `explain` on a region inside another one.
_NESTED = "is inside the region"

FindingCode = Literal[
    "no_region",
    "nothing_freed",
    "no_lower_peak",
    "undone",
    "offload_ignored",
    "useless_rule",
    "repeated",
    "out_of_memory",
    "random_bits",
    "author_region",
    "warning",
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that does not work as the rules say.

    Attributes:
        code: Kind of finding, for programs.
        message: What is wrong, and how to fix it.
    """

    code: FindingCode
    message: str


_NO_RULES_FINDINGS = (
    Finding(
        code="no_region",
        message="no rules are applied to the model, so nothing is recomputed: pass check(..., rules=...).",
    ),
)


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class CheckReport:
    """What rules should free and what the compiler freed, per device; `str()` is a table with the findings below it.

    Attributes:
        target: Name of the target.
        residual_bytes: Computed residuals, without and with the rules; 0 for a whole step, which has none.
        planned_peak_bytes: Peak of the traced program as `timeline` walks it, without and with the rules.
        temp_bytes: The compiler's temporaries, without and with the rules.
        compiled_peak_bytes: The compiler's peak on the device, without and with the rules. On a TPU it counts on-chip
            memory, which `temp_bytes` does not.
        host_bytes: Residuals that the rules offload to host memory.
        findings: What does not work; empty if everything does.
        notes: What has no effect beside something that does, such as one of several offloaded names.

    Example:
        >>> import jax, jax.numpy as jnp, remattools as rt
        >>> from flax import nnx
        >>> model = nnx.eval_shape(lambda: nnx.Linear(64, 64, rngs=nnx.Rngs(0)))
        >>> x = jax.ShapeDtypeStruct((8, 64), jnp.float32)
        >>> loss = lambda model, x: jnp.sum(model(x) ** 2)
        >>> report = rt.check(loss, model, x, rules={".": "everything_saveable"}, target="cpu")
        >>> report.ok, [finding.code for finding in report.findings]
        (False, ['nothing_freed'])
    """

    target: str
    residual_bytes: tuple[int, int]
    planned_peak_bytes: tuple[int, int]
    temp_bytes: tuple[int, int]
    compiled_peak_bytes: tuple[int, int]
    host_bytes: int
    findings: tuple[Finding, ...]
    notes: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether nothing was found wrong."""
        return not self.findings

    @property
    def _has_temporaries_in_peak(self) -> bool:
        return all(peak >= temp for peak, temp in zip(self.compiled_peak_bytes, self.temp_bytes, strict=True))

    def as_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {**dataclasses.asdict(self), "ok": self.ok}

    def __repr__(self) -> str:
        codes = ", ".join(finding.code for finding in self.findings)
        return f"CheckReport(target={self.target!r}, ok={self.ok}, findings=[{codes}])"

    def __str__(self) -> str:
        rows = []
        for label, (plain, ruled) in (
            ("residuals of the traced program", self.residual_bytes),
            ("peak of the traced program", self.planned_peak_bytes),
            (f"temp on {self.target}", self.temp_bytes),
            (f"peak on {self.target}", self.compiled_peak_bytes),
        ):
            if label.startswith("peak on") and not self._has_temporaries_in_peak:
                continue
            if label.startswith("residuals") and not plain + ruled:
                continue
            rows.append((label, format_bytes(plain), format_bytes(ruled)))
        if self.host_bytes:
            rows.append(("in host memory", "", format_bytes(self.host_bytes)))
        lines = [format_table(("", "plain", "with rules"), rows, numeric=("plain", "with rules"))]
        lines += [f"{finding.code}: {finding.message}" for finding in self.findings]
        lines += ["ok: the rules free what they should."] * self.ok
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def check(
    fn: Callable[..., Any],
    *args: Any,
    rules: Any = None,
    differentiate: bool = True,
    target: str | Target | jax.Device | None = None,
    cache: Cache | str | os.PathLike[str] | None = None,
) -> CheckReport:
    """Compare what rules should free with what the compiler freed.

    Args:
        fn: A loss of a model and a batch, or with `differentiate=False` a whole step, jitted or not.
        *args: Its arguments, real or abstract.
        rules: Rules in any form that `compare` takes; None checks the rules already applied to the model.
        differentiate: Whether `fn` is a loss, whose gradient is checked. A whole step has no residuals: it is judged by
            its peak alone.
        target: Target name, topology or device to compile for; None as in `measure`.
        cache: Directory or `Cache` of earlier measurements; None as in `measure`.

    Returns:
        The memory without and with the rules, and what does not work.

    Raises:
        MeasureError: If the call has no model, or nothing to differentiate.
        UnmatchedRuleError: If a rule matches no module.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import remattools as rt
        >>> from flax import nnx
        >>> model = nnx.eval_shape(lambda: nnx.Linear(64, 64, rngs=nnx.Rngs(0)))
        >>> x = jax.ShapeDtypeStruct((8, 64), jnp.float32)
        >>> report = rt.check(
        ...     lambda model, x: jnp.sum(model(x) ** 2), model, x, rules={".": "everything_saveable"}, target="cpu"
        ... )
        >>> [finding.code for finding in report.findings]
        ['nothing_freed']
    """
    where = find_target(target)
    model = find_model(fn, args)
    new_rules = None if rules is None else make_rules(model, rules)
    with use_rules(model, _REGIONS_OFF):
        sizes = find_device_sizes(pure_call.stage(pure_call.unwrap_jit(fn), args), where, differentiate=differentiate)
        subject = _Subject(fn, args, model, where, cache, sizes, differentiate)
        plain = _measure_memory(subject)
    with use_rules(model, new_rules):
        ruled = _measure_memory(subject)
        program = _trace_jaxpr(fn, args, differentiate=differentiate)
        regions = list(_find_regions(program))
        has_actions = any(application.get_active_actions(find_modules(model)))
        warnings = _collect_warnings(model)
        random = list(_find_random_problem(subject, ruled.measurement))
        idle = find_idle_offloads(model, ruled.host_bytes, lambda: _trace_memory(subject)[1]) if differentiate else []
        copied = list(_find_copied_offload(subject, ruled))
        authored = list(_find_author_regions(subject)) if has_author_region(program) else []
    if has_actions or regions:
        # In a step each region stands twice: in the forward and in the backward pass.
        repeated = _find_repeated_regions(regions) if differentiate else ()
        problems = list(_find_problems(plain, ruled, len(regions), where))
        if authored:  # the reason why the rules free nothing
            problems = [finding for finding in problems if finding.code in ("out_of_memory", "offload_ignored")]
        if copied:  # the reason for the memory that is not freed
            problems = [finding for finding in problems if finding.code != "undone"]
        if random:
            problems = [*random, *_drop_consequences(problems, plain.measurement, ruled.measurement)]
        findings = [*authored, *problems, *copied, *_find_idle_names(idle), *repeated, *warnings]
    else:
        findings = [*_NO_RULES_FINDINGS, *warnings]
    if new_rules is not None and regions:
        useless = list(_find_useless_rules(subject, new_rules, ruled))
        if not useless:  # regions inside regions are meant, where each of them frees something
            findings = [finding for finding in findings if _NESTED not in finding.message]
        findings += useless
    return CheckReport(
        target=where.name,
        residual_bytes=(plain.residual_bytes, ruled.residual_bytes),
        planned_peak_bytes=(plain.peak_bytes, ruled.peak_bytes),
        temp_bytes=(plain.measurement.temp_bytes, ruled.measurement.temp_bytes),
        compiled_peak_bytes=(plain.measurement.device_peak_bytes, ruled.measurement.device_peak_bytes),
        host_bytes=ruled.host_bytes,
        findings=tuple(findings),
        notes=tuple(describe_idle_offload(each) for each in idle if each.has_others),
    )


@dataclasses.dataclass(frozen=True)
class _Subject:
    fn: Callable[..., Any]
    args: tuple[Any, ...]
    model: nnx.Module
    target: Target
    cache: Cache | str | os.PathLike[str] | None
    sizes: DeviceSizes
    differentiate: bool


@dataclasses.dataclass(frozen=True)
class _ProgramMemory:
    residual_bytes: int
    host_bytes: int
    peak_bytes: int
    measurement: Measurement


def _measure_memory(subject: _Subject) -> _ProgramMemory:
    return _ProgramMemory(*_trace_memory(subject), _measure_program(subject))


def _measure_program(subject: _Subject) -> Measurement:
    return measure(
        subject.fn, *subject.args, target=subject.target, differentiate=subject.differentiate, cache=subject.cache
    )


def _trace_memory(subject: _Subject) -> tuple[int, int, int]:
    """Return bytes on the device and in host memory that are saved, and the peak, of the traced program."""
    if not subject.differentiate:
        program = _trace_jaxpr(subject.fn, subject.args, differentiate=False)
        return 0, 0, make_timeline(program, 0, subject.sizes).peak_bytes
    call = pure_call.stage(pure_call.unwrap_jit(subject.fn), subject.args)
    pure_call.check_differentiable(call)
    program, count = linearize_call(call)
    report = make_report(call, program, count, subject.sizes)
    return report.computed_bytes, report.host_bytes, make_timeline(program, count, subject.sizes).peak_bytes


def _find_problems(plain: _ProgramMemory, ruled: _ProgramMemory, regions: int, target: Target) -> Iterator[Finding]:
    if not regions:
        yield Finding(
            code="no_region",
            message="the program contains no region of the rules. The function does not run the model that the rules "
            "are applied to: split the graphdef (nnx.split) after remattools.apply, not before, and call the modules "
            "that the rules match.",
        )
        return
    if ruled.residual_bytes >= plain.residual_bytes > 0:
        yield Finding(
            code="nothing_freed",
            message=f"{format_bytes(ruled.residual_bytes)} of residuals are saved with the rules, "
            f"{format_bytes(plain.residual_bytes)} without: save less in the regions, or make them larger.",
        )
    yield from _find_compiler_problems(plain, ruled, target)


def _find_compiler_problems(plain: _ProgramMemory, ruled: _ProgramMemory, target: Target) -> Iterator[Finding]:
    """Yield what the compiled programs do not do, although the traced ones do."""
    refused = ruled.measurement.out_of_memory
    if refused is not None:
        yield Finding(
            code="out_of_memory",
            message=f"with the rules the program needs {format_bytes(refused.needed_bytes)} of "
            f"{format_bytes(refused.limit_bytes)} on {target.name}"
            + ("" if plain.measurement.fits else f", without them {format_bytes(plain.measurement.total_bytes)}")
            + ': plan(..., budget="fit") searches for rules that fit, and says what no rule can reach.',
        )
    if not plain.measurement.fits or not ruled.measurement.fits:
        return
    memory = _choose_memory(plain.measurement, ruled.measurement)
    before = getattr(plain.measurement, memory)
    freed = before - getattr(ruled.measurement, memory)
    freed_at_peak = plain.peak_bytes - ruled.peak_bytes
    freed_residuals = plain.residual_bytes - ruled.residual_bytes
    if freed_at_peak > _NOISE * plain.peak_bytes and freed < _MIN_FREED_SHARE * freed_at_peak:
        subject = "the peak" if memory == "device_peak_bytes" else "the size of the temporaries"
        change = f"{'fell' if freed >= 0 else 'rose'} by {format_bytes(abs(freed))}"
        yield Finding(
            code="undone",
            message=f"the rules should free {format_bytes(freed_at_peak)} at the peak, but {subject} on {target.name} "
            f"{change}: the compiler undid the recomputation. Check that prevent_cse=False is used only inside a scan, "
            "and that jax is at least 0.11.2 (older CPU compilers remove the barrier between the two computations)."
            + _describe_peak(ruled.measurement),
        )
    elif freed_residuals > _NOISE * plain.residual_bytes and freed <= _NOISE * before:
        yield Finding(
            code="no_lower_peak",
            message=f"the rules save {format_bytes(freed_residuals)} less from forward to backward, but the memory on "
            f"{target.name} is not lower: recomputing a whole region needs the memory that it freed. Apply the rules "
            "to smaller modules, such as the blocks instead of the model." + _describe_peak(ruled.measurement),
        )
    if ruled.host_bytes and not ruled.measurement.host_temp_bytes:
        yield Finding(
            code="offload_ignored",
            message=f"the rules offload {format_bytes(ruled.host_bytes)} to host memory, but the program compiled for "
            f"{target.name} uses no host memory: offloading has no effect on this target.",
        )


def _find_random_problem(subject: _Subject, measurement: Measurement) -> Iterator[Finding]:
    """Yield what the regions in force draw again, if that costs memory."""
    if random_cost.may_be_costly(measurement):
        redrawn = random_cost.find_redrawn_in_call(subject.fn, subject.args, differentiate=subject.differentiate)
        message = random_cost.describe_cost(measurement, redrawn)
        if message:
            yield Finding(code="random_bits", message=f"{message} To free it, {random_cost.describe_cures()}")


def _drop_consequences(findings: list[Finding], plain: Measurement, ruled: Measurement) -> list[Finding]:
    """Return the findings without those that only say that the memory is not lower, if it is without random bits."""
    if not ruled.fits or ruled.temp_bytes - random_cost.count_random_bytes(ruled) > plain.temp_bytes:
        return findings
    return [finding for finding in findings if finding.code not in ("undone", "no_lower_peak")]


def _find_author_regions(subject: _Subject) -> Iterator[Finding]:
    """Yield the modules with rules that run inside a `jax.checkpoint` of the model's code."""
    if not subject.differentiate:  # a step shows no names: its regions run in both passes
        return
    program = trace_call(pure_call.stage(pure_call.unwrap_jit(subject.fn), subject.args))
    for row in explaining.explain_model(subject.model, program=program).rows:
        if row.author_regions:
            message = f"{row.path} {explaining.describe_author_regions(row.author_regions)}"
            yield Finding(code="author_region", message=message)


def _find_idle_names(idle: list[IdleOffload]) -> Iterator[Finding]:
    """Yield the offloaded names that put nothing into host memory, where no other name of the same rule does."""
    for each in idle:
        if not each.has_others:
            yield Finding(code="offload_ignored", message=describe_idle_offload(each))


def _find_copied_offload(subject: _Subject, ruled: _ProgramMemory) -> Iterator[Finding]:
    """Yield a finding if offloading takes as much memory on the device as saving the same values there."""
    if not (ruled.host_bytes and ruled.measurement.host_temp_bytes and ruled.measurement.fits):
        return
    with save_instead(subject.model):
        saved = _measure_program(subject)
    memory = _choose_memory(saved, ruled.measurement)
    before, after = getattr(saved, memory), getattr(ruled.measurement, memory)
    if saved.fits and after >= (1 - _NOISE) * before:
        yield Finding(
            code="offload_ignored",
            message=f"the rules put {format_bytes(ruled.measurement.host_temp_bytes)} into host memory, but need "
            f"{format_bytes(after)} on {subject.target.name}, and {format_bytes(before)} if the same values are saved "
            "there: the compiler keeps copies on the device. Save these values or recompute them; the values of layers "
            "that a scan runs do leave the device." + _describe_peak(ruled.measurement),
        )


def _choose_memory(*measurements: Measurement) -> str:
    """Return the attribute that counts all temporaries of these programs on the device."""
    on_chip = any(measurement.temporaries_on_chip for measurement in measurements)
    return "device_peak_bytes" if on_chip else "temp_bytes"


def _trace_jaxpr(fn: Any, args: tuple[Any, ...], *, differentiate: bool) -> Any:
    call = pure_call.stage(pure_call.unwrap_jit(fn), args)
    return trace_with_paths(call, select_loss_or_floats if differentiate else lambda evaluated: evaluated[1])


@dataclasses.dataclass(frozen=True)
class _Region:
    """One region in a program; at one position, equal inputs and programs compute equal values."""

    path: str
    position: tuple[int, ...]  # equal blocks share a program, so its variables alone do not identify a value
    inputs: tuple[Any, ...]
    jaxpr: Any


def _find_regions(jaxpr: Any, outer_stacks: tuple[str, ...] = (), position: tuple[int, ...] = ()) -> Iterator[_Region]:
    """Yield the regions made by rules; their operations are marked, those of a hand-written `jax.checkpoint` not."""
    for number, equation in enumerate(jaxprs.open_jaxpr(jaxpr).eqns):
        stacks = (*outer_stacks, str(equation.source_info.name_stack))
        for index, (_, nested) in enumerate(jaxprs.find_subjaxprs(equation)):
            inner = jaxprs.open_jaxpr(nested)
            inside = [str(e.source_info.name_stack) for e in inner.eqns]
            marked = next((stack for stack in inside if scopes.REGION in stack), None)
            if jaxprs.is_region(equation) and marked is not None:
                path = locate([*stacks, marked])[1]
                inputs = tuple(atom if isinstance(atom, core.Var) else str(atom) for atom in equation.invars)
                yield _Region(format_path(path or ()), position, inputs, inner)
            yield from _find_regions(nested, stacks, (*position, number, index))


def _find_repeated_regions(regions: list[_Region]) -> Iterator[Finding]:
    """Yield modules called several times on the same values, whose regions recompute the same."""
    groups: dict[tuple[Any, ...], list[_Region]] = {}
    for region in regions:
        groups.setdefault((region.position, region.inputs), []).append(region)
    for group in groups.values():
        same = [region for region in group if str(region.jaxpr) == str(group[0].jaxpr)]
        if len(same) > 1:
            yield Finding(
                code="repeated",
                message=f"{same[0].path} is called {len(same)} times on the same values, and each region is recomputed "
                "in the backward pass: call it once and reuse the result.",
            )


def _collect_warnings(model: nnx.Module) -> list[Finding]:
    paths_by_warning: dict[str, list[str]] = {}
    for row in explaining.explain_model(model).rows:
        for warning in row.warnings:
            paths_by_warning.setdefault(warning, []).append(row.path)
    return [
        Finding(
            code="warning", message=f"{paths[0]}{f' and {len(paths) - 1} more' if len(paths) > 1 else ''} {warning}"
        )
        for warning, paths in paths_by_warning.items()
    ]


def _find_useless_rules(subject: _Subject, rules: Rules, ruled: _ProgramMemory) -> Iterator[Finding]:
    """Yield rules whose removal makes no memory larger; a single rule is judged by `nothing_freed`.

    The traced program clears most rules; where it says that one frees nothing, the compiled program decides.
    """
    pairs = list(rules)
    remats = [number for number, (_, action) in enumerate(pairs) if isinstance(action, Remat)]
    if len(remats) < 2 or not ruled.measurement.fits:
        return
    for number in remats:
        others = Rules(pair for index, pair in enumerate(pairs) if index != number)
        with use_rules(subject.model, others):
            traced = _trace_memory(subject)
            if traced[0] > ruled.residual_bytes or traced[2] > ruled.peak_bytes:
                continue
            without = _measure_program(subject)
        memory = _choose_memory(without, ruled.measurement)
        before, after = getattr(without, memory), getattr(ruled.measurement, memory)
        if without.fits and before <= (1 + _NOISE) * after:
            yield Finding(
                code="useless_rule",
                message=f"the rule {pairs[number][0].text!r} frees nothing: the program needs {format_bytes(before)} "
                f"without it and {format_bytes(after)} with it on {subject.target.name}"
                + (
                    f", and {format_bytes(traced[0])} and {format_bytes(ruled.residual_bytes)} of residuals are saved"
                    if subject.differentiate
                    else ""
                )
                + ". Its regions save at least as much as they free; remove it.",
            )


def _describe_peak(measurement: Measurement) -> str:
    """Return the largest live buffers at the peak of a compiled program as a sentence."""
    rows = measurement.live[:_MAX_LIVE_ROWS]
    if not rows:
        return ""
    shown = ", ".join(f"{row.path} {row.operation} {row.shape}: {format_bytes(row.bytes)}" for row in rows)
    return f" Live at the peak of the compiled program: {shown}."
