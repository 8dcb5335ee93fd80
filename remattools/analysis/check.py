# SPDX-License-Identifier: Apache-2.0
"""`check`: report whether rules free the memory they are meant to free.

Sits on `findings`, which says what can be wrong.
"""

import dataclasses
import os
from collections.abc import Callable
from typing import Any

import jax

from ..compiler.cache import Cache
from ..compiler.partition import find_device_sizes
from ..compiler.targets import Target, find_target
from ..rules.ruleset import Rules
from ..text import format_bytes, format_table
from ..tracing import pure_call
from ..transform import apply as application
from ..transform.author_regions import has_author_region
from ..transform.modules import find_modules
from .findings import (
    NO_RULES_FINDINGS,
    Finding,
    Subject,
    collect_warnings,
    drop_consequences,
    find_author_regions,
    find_copied_offload,
    find_idle_names,
    find_problems,
    find_random_problem,
    find_regions,
    find_repeated_regions,
    find_useless_rules,
    measure_memory,
    trace_jaxpr,
    trace_memory,
)
from .offloads import describe_idle_offload, find_idle_offloads
from .ruled_call import find_model, make_rules, use_rules

_REGIONS_OFF = Rules({".": False, "**": False})
# In the warning of `explain` on a region inside another one.
_NESTED = "is inside the region"


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
        subject = Subject(fn, args, model, where, cache, sizes, differentiate)
        plain = measure_memory(subject)
    with use_rules(model, new_rules, fn) as fn:
        subject = dataclasses.replace(subject, fn=fn)
        ruled = measure_memory(subject)
        program = trace_jaxpr(fn, args, differentiate=differentiate)
        regions = list(find_regions(program))
        has_actions = any(application.get_active_actions(find_modules(model)))
        warnings = collect_warnings(model)
        random = list(find_random_problem(subject, ruled.measurement))
        idle = find_idle_offloads(model, ruled.host_bytes, lambda: trace_memory(subject)[1]) if differentiate else []
        copied = list(find_copied_offload(subject, ruled))
        authored = list(find_author_regions(subject)) if has_author_region(program) else []
    if has_actions or regions:
        # In a step each region stands twice: in the forward and in the backward pass.
        repeated = find_repeated_regions(regions) if differentiate else ()
        problems = list(find_problems(plain, ruled, len(regions), where))
        if authored:  # the reason why the rules free nothing
            problems = [finding for finding in problems if finding.code in ("out_of_memory", "offload_ignored")]
        if copied:  # the reason for the memory that is not freed
            problems = [finding for finding in problems if finding.code != "undone"]
        if random:
            problems = [*random, *drop_consequences(problems, plain.measurement, ruled.measurement)]
        findings = [*authored, *problems, *copied, *find_idle_names(idle), *repeated, *warnings]
    else:
        findings = [*NO_RULES_FINDINGS, *warnings]
    if new_rules is not None and regions:
        useless = list(find_useless_rules(subject, new_rules, ruled))
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
