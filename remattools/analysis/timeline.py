# SPDX-License-Identifier: Apache-2.0
"""How much is alive at each moment of a program, and what fills the memory at its fullest.

Sits on `program` and `residuals`. A walk over the traced program in its order: a
value lives from the operation that computes it to the last one that reads it; a nested
program is one operation, with what it needs inside on top. The compiler fuses, reorders
and reuses, so its own figure (`measure`) differs; what the walk adds is the names of what
is alive.
"""

import dataclasses
import os
from collections.abc import Callable
from typing import Any

from jax.extend import core

from ..compiler.measurement import Allocation, format_bytes
from ..jaxpr import jaxprs
from ..rules.fold_paths import format_paths, mask_path
from ..rules.paths import format_path
from ..tracing import pure_call
from ..tracing.origins import is_backward, is_in_host_memory, locate, trace_with_paths
from . import plot
from .residuals import linearize_call

_MAX_ROWS = 12


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timeline:
    """Bytes alive on the device while a program runs, arguments apart.

    Attributes:
        bytes: After each operation, in the program's order.
        backward: Index of the first operation of the backward pass, or None.
        argument_bytes: Alive throughout.
        largest: What is alive at the peak, equal layers as one, the largest first.
    """

    bytes: tuple[int, ...]
    backward: int | None
    argument_bytes: int
    largest: tuple[Allocation, ...]

    @property
    def peak_bytes(self) -> int:
        """The most that is alive at once."""
        return max(self.bytes, default=0)

    @property
    def peak_index(self) -> int:
        """The operation at which it is."""
        return self.bytes.index(self.peak_bytes) if self.bytes else 0

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {**dataclasses.asdict(self), "peak_bytes": self.peak_bytes, "peak_index": self.peak_index}

    def __str__(self) -> str:
        half = "forward" if self.backward is None or self.peak_index < self.backward else "backward"
        lines = [
            f"peak {format_bytes(self.peak_bytes)} at operation {self.peak_index} of {len(self.bytes)} ({half}), "
            f"beside {format_bytes(self.argument_bytes)} of arguments; alive then:"
        ]
        lines += [
            f"{format_bytes(a.bytes):>11}  {a.path}  {a.name}  {a.shape}" + (f" x{a.count}" if a.count > 1 else "")
            for a in self.largest[:_MAX_ROWS]
        ]
        return "\n".join(lines)

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw the bytes over the program; PNG or SVG, by the file's ending.

        Raises:
            MeasureError: If matplotlib is not installed.
        """
        with plot.open_figure(path) as axes:
            axes.fill_between(range(len(self.bytes)), [count / 2**20 for count in self.bytes], alpha=0.4, linewidth=0)
            if self.backward is not None:
                axes.axvline(self.backward, linestyle=":", color="gray")
                axes.annotate("backward", (self.backward, 0), rotation=90, color="gray")
            axes.plot([self.peak_index], [self.peak_bytes / 2**20], "o", color="black", markersize=4)
            names = "\n".join(f"{format_bytes(a.bytes)} {a.path} {a.name}" for a in self.largest[:5])
            axes.set_title(names, fontsize=7, loc="left")
            axes.set_xlabel("operation")
            axes.set_ylabel("MiB alive, without arguments")
            axes.set_ylim(bottom=0)


def timeline(fn: Callable[..., Any], *args: Any, differentiate: bool = False) -> Timeline:
    """Walk the program of `fn(*args)` and say what is alive when.

    Args:
        fn: As in `measure`.
        *args: Its arguments, real or abstract.
        differentiate: Walk the gradient of the loss that `fn` returns.

    Raises:
        MeasureError: If there is nothing to differentiate.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> import remattools as rt
        >>> x = jax.ShapeDtypeStruct((8,), jnp.float32)
        >>> rt.timeline(lambda x: jnp.sin(x) + jnp.cos(x), x).peak_bytes  # both and the sum
        96
    """
    call = pure_call.stage(pure_call.unwrap_jit(fn), args)
    if differentiate:
        pure_call.check_differentiable(call)
        return make_timeline(*linearize_call(call))
    return make_timeline(trace_with_paths(call, lambda evaluated: evaluated[1]), 0)


def make_timeline(jaxpr: Any, num_residuals: int) -> Timeline:
    """The timeline of a program whose first `num_residuals` results are not held to its end, as from `linearised`."""
    top = jaxprs.open_jaxpr(jaxpr)
    top = top.replace(outvars=top.outvars[num_residuals:], debug_info=top.debug_info._replace(result_paths=None))
    points, peak = _LivenessWalk().walk(top)
    backward = next((i for i, e in enumerate(top.eqns) if is_backward(e)), None)
    return Timeline(
        bytes=tuple(points),
        backward=backward,
        argument_bytes=sum(jaxprs.count_aval_bytes(var.aval) for var in top.invars),
        largest=_merge_allocations([_make_allocation(aval, name, stacks) for aval, name, stacks in peak]),
    )


# A value that is alive: its aval, what computes it, and the name stacks around that, outermost first.
_LiveBuffer = tuple[Any, str, list[str]]


class _LivenessWalk:
    """Liveness of a program and the programs nested in it; equal ones are walked once."""

    def __init__(self) -> None:
        self.memo: dict[int, tuple[int, list[_LiveBuffer], Any]] = {}

    def walk(self, jaxpr: Any) -> tuple[list[int], list[_LiveBuffer]]:
        """Bytes alive after each equation, and what is alive at the fullest moment; inputs do not count."""
        last = _find_last_reads(jaxpr)
        alive: dict[Any, _LiveBuffer] = {}
        total, most = 0, -1
        points: list[int] = []
        fullest: list[_LiveBuffer] = []
        for number, equation in enumerate(jaxpr.eqns):
            stack = str(equation.source_info.name_stack)
            for var in equation.outvars:
                if not _is_dropped(var):
                    alive[var] = (var.aval, equation.primitive.name, [stack])
                    total += _count_device_bytes(var.aval)
            inside, below = self.walk_nested(equation)
            points.append(total + inside)
            if total + inside > most:
                most = total + inside
                fullest = [*alive.values(), *((aval, name, [stack, *stacks]) for aval, name, stacks in below)]
            for var in [*equation.invars, *equation.outvars]:
                if isinstance(var, core.Var) and var in alive and last.get(var, -1) <= number:
                    total -= _count_device_bytes(alive.pop(var)[0])
        return points, fullest

    def walk_nested(self, equation: Any) -> tuple[int, list[_LiveBuffer]]:
        """What the programs of an equation need beyond its results, and what that is."""
        best: tuple[int, list[_LiveBuffer]] = (0, [])
        for _, nested in jaxprs.find_subjaxprs(equation):
            inner = jaxprs.open_jaxpr(nested)
            if id(inner) not in self.memo:
                points, fullest = self.walk(inner)
                # The program is kept so that its id stays its own.
                self.memo[id(inner)] = (max(points, default=0), fullest, inner)
            peak, fullest, _ = self.memo[id(inner)]
            extra = peak - sum(_count_device_bytes(var.aval) for var in inner.outvars)
            if extra > best[0]:
                best = (extra, fullest)
        return best


def _find_last_reads(jaxpr: Any) -> dict[Any, int]:
    last: dict[Any, int] = {}
    for number, equation in enumerate(jaxpr.eqns):
        last.update((var, number) for var in equation.invars if isinstance(var, core.Var))
    last.update((var, len(jaxpr.eqns)) for var in jaxpr.outvars if isinstance(var, core.Var))
    return last


def _is_dropped(var: Any) -> bool:
    return type(var).__name__ == "DropVar"


def _count_device_bytes(aval: Any) -> int:
    return 0 if is_in_host_memory(aval) else jaxprs.count_aval_bytes(aval)


def _make_allocation(aval: Any, name: str, stacks: list[str]) -> Allocation:
    path, _ = locate(stacks)
    return Allocation(path=format_path(path), name=name, shape=aval.str_short(), bytes=_count_device_bytes(aval))


def _merge_allocations(allocations: list[Allocation]) -> tuple[Allocation, ...]:
    groups: dict[Any, list[Allocation]] = {}
    for item in allocations:
        groups.setdefault((mask_path(item.path), item.name, item.shape), []).append(item)
    rows = [
        dataclasses.replace(
            group[0],
            path=format_paths(list(dict.fromkeys(item.path for item in group))),
            bytes=sum(item.bytes for item in group),
            count=len(group),
        )
        for group in groups.values()
    ]
    return tuple(sorted((row for row in rows if row.bytes), key=lambda row: -row.bytes))
