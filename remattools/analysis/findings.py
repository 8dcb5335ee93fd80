# SPDX-License-Identifier: Apache-2.0
"""What can be wrong with rules: the findings of `check`, each found in the traced and in the compiled program.

Sits on `measure`, `residuals`, `timeline` and `transform.explain`. A rule can fail to help without an error: the
compiler merges the recomputation with the first computation, an offload stays on the device, the saved values outweigh
the freed ones, one region is inside another or repeats it, or a graphdef was split off before the rules were applied.
"""

import dataclasses
import os
from collections.abc import Callable, Iterator
from typing import Any, Literal

from flax import nnx
from jax.extend import core

from ..compiler.cache import Cache
from ..compiler.partition import DeviceSizes
from ..compiler.report import Measurement
from ..compiler.targets import Target
from ..jaxpr import jaxprs
from ..rules.paths import format_path
from ..rules.rule import Remat
from ..rules.ruleset import Rules
from ..text import format_bytes
from ..tracing import pure_call
from ..tracing.origins import locate, select_loss_or_floats, trace_with_paths
from ..transform import explain as explaining
from ..transform.functions import remove_action
from ..transform.naming import scopes
from . import random_cost
from .explain_call import trace_call
from .measure import measure
from .offloads import IdleOffload, describe_idle_offload, save_instead
from .residuals import linearize_call, make_report
from .ruled_call import use_rules
from .timeline import make_timeline

# The compiled program must free at least this share of what the traced one frees; the compiler packs the rest.
_MIN_FREED_SHARE = 0.25
# Differences below this share of the plain program's memory are the compiler's noise.
_NOISE = 0.02
_MAX_LIVE_ROWS = 3

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


NO_RULES_FINDINGS = (
    Finding(
        code="no_region",
        message="no rules are applied to the model, so nothing is recomputed: pass check(..., rules=...).",
    ),
)


@dataclasses.dataclass(frozen=True)
class Subject:
    """What is checked.

    Attributes:
        fn: The function.
        args: Its arguments.
        model: The model among them.
        target: What it is compiled for.
        cache: Earlier measurements.
        sizes: Sizes on one device.
        differentiate: Whether the function is a loss, whose gradient is checked.
    """

    fn: Callable[..., Any]
    args: tuple[Any, ...]
    model: nnx.Module
    target: Target
    cache: Cache | str | os.PathLike[str] | None
    sizes: DeviceSizes
    differentiate: bool


@dataclasses.dataclass(frozen=True)
class ProgramMemory:
    """The memory of one program, traced and compiled.

    Attributes:
        residual_bytes: Computed residuals on the device.
        host_bytes: Residuals in host memory.
        peak_bytes: Peak of the traced program.
        measurement: The compiled program.
    """

    residual_bytes: int
    host_bytes: int
    peak_bytes: int
    measurement: Measurement


def measure_memory(subject: Subject) -> ProgramMemory:
    """Trace and compile the subject under the rules in force."""
    return ProgramMemory(*trace_memory(subject), _measure_program(subject))


def _measure_program(subject: Subject) -> Measurement:
    return measure(
        subject.fn, *subject.args, target=subject.target, differentiate=subject.differentiate, cache=subject.cache
    )


def trace_memory(subject: Subject) -> tuple[int, int, int]:
    """Return bytes on the device and in host memory that are saved, and the peak, of the traced program."""
    if not subject.differentiate:
        program = trace_jaxpr(subject.fn, subject.args, differentiate=False)
        return 0, 0, make_timeline(program, 0, subject.sizes).peak_bytes
    call = pure_call.stage(pure_call.unwrap_jit(subject.fn), subject.args)
    pure_call.check_differentiable(call)
    program, count = linearize_call(call)
    report = make_report(call, program, count, subject.sizes)
    return report.computed_bytes, report.host_bytes, make_timeline(program, count, subject.sizes).peak_bytes


def find_problems(plain: ProgramMemory, ruled: ProgramMemory, regions: int, target: Target) -> Iterator[Finding]:
    """Yield what the rules in force do not do, although the model runs.

    Args:
        plain: The program without rules.
        ruled: The program with them.
        regions: How many regions it has.
        target: What both are compiled for.
    """
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


def _find_compiler_problems(plain: ProgramMemory, ruled: ProgramMemory, target: Target) -> Iterator[Finding]:
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


def find_random_problem(subject: Subject, measurement: Measurement) -> Iterator[Finding]:
    """Yield what the regions in force draw again, if that costs memory."""
    if random_cost.may_be_costly(measurement):
        redrawn = random_cost.find_redrawn_in_call(subject.fn, subject.args, differentiate=subject.differentiate)
        message = random_cost.describe_cost(measurement, redrawn)
        if message:
            yield Finding(code="random_bits", message=f"{message} To free it, {random_cost.describe_cures()}")


def drop_consequences(findings: list[Finding], plain: Measurement, ruled: Measurement) -> list[Finding]:
    """Return the findings without those that only say that the memory is not lower, if it is without random bits."""
    if not ruled.fits or ruled.temp_bytes - random_cost.count_random_bytes(ruled) > plain.temp_bytes:
        return findings
    return [finding for finding in findings if finding.code not in ("undone", "no_lower_peak")]


def find_author_regions(subject: Subject) -> Iterator[Finding]:
    """Yield the modules with rules that run inside a `jax.checkpoint` of the model's code."""
    if not subject.differentiate:  # a step shows no names: its regions run in both passes
        return
    program = trace_call(pure_call.stage(pure_call.unwrap_jit(subject.fn), subject.args))
    for row in explaining.explain_model(subject.model, program=program).rows:
        if row.author_regions:
            message = f"{row.path} {explaining.describe_author_regions(row.author_regions)}"
            yield Finding(code="author_region", message=message)


def find_idle_names(idle: list[IdleOffload]) -> Iterator[Finding]:
    """Yield the offloaded names that put nothing into host memory, where no other name of the same rule does."""
    for each in idle:
        if not each.has_others:
            yield Finding(code="offload_ignored", message=describe_idle_offload(each))


def find_copied_offload(subject: Subject, ruled: ProgramMemory) -> Iterator[Finding]:
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


def trace_jaxpr(fn: Any, args: tuple[Any, ...], *, differentiate: bool) -> Any:
    """Return the program of a loss's gradient, or of a whole step, with module paths."""
    call = pure_call.stage(pure_call.unwrap_jit(fn), args)
    return trace_with_paths(call, select_loss_or_floats if differentiate else lambda evaluated: evaluated[1])


@dataclasses.dataclass(frozen=True)
class _Region:
    """One region in a program; at one position, equal inputs and programs compute equal values."""

    path: str
    position: tuple[int, ...]  # equal blocks share a program, so its variables alone do not identify a value
    inputs: tuple[Any, ...]
    jaxpr: Any


def find_regions(jaxpr: Any, outer_stacks: tuple[str, ...] = (), position: tuple[int, ...] = ()) -> Iterator[_Region]:
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
            yield from find_regions(nested, stacks, (*position, number, index))


def find_repeated_regions(regions: list[_Region]) -> Iterator[Finding]:
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


def collect_warnings(model: nnx.Module) -> list[Finding]:
    """Return the warnings of `explain`, one for each text."""
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


def find_useless_rules(subject: Subject, rules: Rules, ruled: ProgramMemory) -> Iterator[Finding]:
    """Yield rules whose removal makes no memory larger; a single rule is judged by `nothing_freed`.

    The traced program clears most rules; where it says that one frees nothing, the compiled program decides.
    """
    pairs = list(rules)
    remats = [number for number, (_, action) in enumerate(pairs) if isinstance(action, Remat)]
    if len(remats) < 2 or not ruled.measurement.fits:
        return
    for number in remats:
        others = Rules(pair for index, pair in enumerate(pairs) if index != number)
        with use_rules(subject.model, others, remove_action(subject.fn)) as fn:
            reduced = dataclasses.replace(subject, fn=fn)
            traced = trace_memory(reduced)
            if traced[0] > ruled.residual_bytes or traced[2] > ruled.peak_bytes:
                continue
            without = _measure_program(reduced)
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
