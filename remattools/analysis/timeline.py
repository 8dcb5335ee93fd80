# SPDX-License-Identifier: Apache-2.0
"""`timeline`: the bytes live at each operation of a program, and the values that fill the peak.

Sits on `tracing` and `residuals`. The traced program is walked in order: a value is live
from the operation that computes it to the last one that reads it. A nested program counts
as one operation, plus what it needs inside. The compiler fuses, reorders and reuses
buffers, so the peak that `measure` reports differs; the walk adds the names of the live
values.
"""

import dataclasses
import os
from collections.abc import Callable
from typing import Any

from jax.extend import core

from ..compiler.out_of_memory import Allocation
from ..compiler.partition import WHOLE_ARRAYS, DeviceSizes, find_device_sizes
from ..jaxpr import jaxprs
from ..rules.fold_paths import merge_rows
from ..rules.paths import format_path
from ..text import format_bytes
from ..tracing import pure_call
from ..tracing.origins import is_backward, locate, trace_with_paths
from . import plot
from .residuals import linearize_call

_MAX_ROWS = 12


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class Timeline:
    """Bytes live on one device while a traced program runs, without its arguments; `str()` lists the peak.

    Attributes:
        bytes: Live bytes after each operation, in the program's order.
        backward: Index of the first operation of the backward pass; None without a backward pass.
        argument_bytes: Size of the arguments, which are live throughout.
        largest: Values live at the peak, equal layers merged, largest first.

    Example:
        >>> import jax, jax.numpy as jnp, remattools as rt
        >>> x = jax.ShapeDtypeStruct((8,), jnp.float32)
        >>> timeline = rt.timeline(lambda x: jnp.sum(jnp.sin(x) * x), x)
        >>> timeline.bytes, timeline.argument_bytes
        ((32, 64, 36), 32)
        >>> print(timeline)
        traced program: peak 64 B at operation 1 of 3 (forward), plus 32 B of arguments; live at the peak:
               32 B  .  sin  float32[8]
               32 B  .  mul  float32[8]
    """

    bytes: tuple[int, ...]
    backward: int | None
    argument_bytes: int
    largest: tuple[Allocation, ...]

    @property
    def peak_bytes(self) -> int:
        """Most bytes live at once."""
        return max(self.bytes, default=0)

    @property
    def peak_index(self) -> int:
        """Index of the operation at which the peak is reached."""
        return self.bytes.index(self.peak_bytes) if self.bytes else 0

    def as_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {**dataclasses.asdict(self), "peak_bytes": self.peak_bytes, "peak_index": self.peak_index}

    def __repr__(self) -> str:
        return f"Timeline({len(self.bytes)} operations, peak_bytes={self.peak_bytes})"

    def __str__(self) -> str:
        half = "forward" if self.backward is None or self.peak_index < self.backward else "backward"
        lines = [
            f"traced program: peak {format_bytes(self.peak_bytes)} at operation {self.peak_index} of {len(self.bytes)} "
            f"({half}), plus {format_bytes(self.argument_bytes)} of arguments; live at the peak:"
        ]
        lines += [
            f"{format_bytes(a.bytes):>11}  {a.path}  {a.name}  {a.shape}" + (f" x{a.count}" if a.count > 1 else "")
            for a in self.largest[:_MAX_ROWS]
        ]
        return "\n".join(lines)

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw live bytes over operations.

        Args:
            path: File to write; its suffix, .png, .svg or .pdf, sets the format.

        Raises:
            MeasureError: If matplotlib is not installed, or the suffix is another.
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
            axes.set_ylabel("live MiB, without arguments")
            axes.set_ylim(bottom=0)


def timeline(fn: Callable[..., Any], *args: Any, differentiate: bool = False) -> Timeline:
    """Walk the program of `fn(*args)` and return which values are live when.

    Args:
        fn: A train step, or a loss with `differentiate=True`.
        *args: Its arguments, real or abstract.
        differentiate: Walk the gradient of the loss that `fn` returns instead.

    Returns:
        The live bytes after each operation, and the values that are live at the peak.

    Raises:
        MeasureError: With `differentiate`, if there is nothing to differentiate.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import remattools as rt
        >>> x = jax.ShapeDtypeStruct((8,), jnp.float32)
        >>> rt.timeline(lambda x: jnp.sin(x) + jnp.cos(x), x).peak_bytes  # sin, cos and their sum
        96
    """
    call = pure_call.stage(pure_call.unwrap_jit(fn), args)
    if differentiate:
        pure_call.check_differentiable(call)
        return make_timeline(*linearize_call(call), find_device_sizes(call, differentiate=True))
    program = trace_with_paths(call, lambda evaluated: evaluated[1])
    return make_timeline(program, 0, find_device_sizes(call, differentiate=False))


def make_timeline(jaxpr: Any, num_residuals: int, sizes: DeviceSizes = WHOLE_ARRAYS) -> Timeline:
    """Return the timeline of a program.

    Args:
        jaxpr: The program.
        num_residuals: How many of its first results are residuals, as from `linearize_call`. They need not live until
            the end.
        sizes: Sizes on one device.
    """
    top = jaxprs.open_jaxpr(jaxpr)
    top = top.replace(outvars=top.outvars[num_residuals:], debug_info=top.debug_info._replace(result_paths=None))
    points, peak = _LivenessWalk(sizes).walk(top, [])
    backward = next((i for i, e in enumerate(top.eqns) if is_backward(e)), None)
    return Timeline(
        bytes=tuple(points),
        backward=backward,
        argument_bytes=sum(sizes.leaf_bytes or (jaxprs.count_aval_bytes(var.aval) for var in top.invars)),
        largest=_merge_allocations([_make_allocation(value, sizes) for value in peak]),
    )


@dataclasses.dataclass(frozen=True)
class _LiveValue:
    """A value with the primitive that computes it, the name stacks around that, outermost first, and its bytes."""

    aval: Any
    name: str
    stacks: list[str]
    bytes: int


class _LivenessWalk:
    """Liveness of a program and the programs nested in it; a program that occurs twice is walked once."""

    def __init__(self, sizes: DeviceSizes) -> None:
        self.sizes = sizes
        self.memo: dict[int, tuple[int, list[_LiveValue], Any]] = {}

    def count_bytes(self, aval: Any, name: str, stacks: list[str]) -> int:
        """Return the bytes of a value on one device."""
        path = locate(stacks)[0] if self.sizes.shapes else None
        return self.sizes.count_bytes(aval, path, name)

    def walk(self, jaxpr: Any, outer: list[str]) -> tuple[list[int], list[_LiveValue]]:
        """Return the bytes live after each equation, and the values live at the peak; inputs do not count.

        The stacks of these values begin inside the program.

        Args:
            jaxpr: The program.
            outer: The name stacks around it.
        """
        last_reads = _find_last_reads(jaxpr)
        live: dict[Any, _LiveValue] = {}
        total, peak = 0, -1
        points: list[int] = []
        at_peak: list[_LiveValue] = []
        for number, equation in enumerate(jaxpr.eqns):
            stack, name = str(equation.source_info.name_stack), equation.primitive.name
            stacks = [*outer, stack]
            for var in equation.outvars:
                if not _is_dropped(var):
                    live[var] = _LiveValue(var.aval, name, [stack], self.count_bytes(var.aval, name, stacks))
                    total += live[var].bytes
            nested_bytes, nested = self.walk_nested(equation, stacks)
            points.append(total + nested_bytes)
            if total + nested_bytes > peak:
                peak = total + nested_bytes
                at_peak = [*live.values(), *nested]
            for var in [*equation.invars, *equation.outvars]:
                if isinstance(var, core.Var) and var in live and last_reads.get(var, -1) <= number:
                    total -= live.pop(var).bytes
        return points, at_peak

    def walk_nested(self, equation: Any, stacks: list[str]) -> tuple[int, list[_LiveValue]]:
        """Return the bytes that an equation's nested programs need beyond its results, and those values."""
        best: tuple[int, list[_LiveValue]] = (0, [])
        for _, nested in jaxprs.find_subjaxprs(equation):
            inner = jaxprs.open_jaxpr(nested)
            if id(inner) not in self.memo:
                points, at_peak = self.walk(inner, stacks)  # equal layers share a program, and their values' sizes
                # A reference to the program, so that its id is not reused.
                self.memo[id(inner)] = (max(points, default=0), at_peak, inner)
            peak, at_peak, _ = self.memo[id(inner)]
            extra = peak - sum(self.count_bytes(var.aval, "", stacks) for var in inner.outvars)
            if extra > best[0]:
                at_peak = [dataclasses.replace(value, stacks=[stacks[-1], *value.stacks]) for value in at_peak]
                best = (extra, at_peak)
        return best


def _find_last_reads(jaxpr: Any) -> dict[Any, int]:
    """Return the index of the last equation that reads each variable; a result is read after the last one."""
    last_reads: dict[Any, int] = {}
    for number, equation in enumerate(jaxpr.eqns):
        last_reads.update((var, number) for var in equation.invars if isinstance(var, core.Var))
    last_reads.update((var, len(jaxpr.eqns)) for var in jaxpr.outvars if isinstance(var, core.Var))
    return last_reads


def _is_dropped(var: Any) -> bool:
    return type(var).__name__ == "DropVar"


def _make_allocation(value: _LiveValue, sizes: DeviceSizes) -> Allocation:
    path, _ = locate(value.stacks)
    shape = value.aval.str_short()
    if sizes.devices > 1 and jaxprs.is_array(value.aval):
        whole = value.aval.shape
        part = sizes.find_shape(value.aval, path, value.name)
        shape = shape if part == whole else f"{value.aval.dtype}[{','.join(map(str, part))}]"
    return Allocation(path=format_path(path), name=value.name, shape=shape, bytes=value.bytes)


def _merge_allocations(allocations: list[Allocation]) -> tuple[Allocation, ...]:
    rows = merge_rows(allocations, lambda item: (item.name, item.shape))
    return tuple(row for row in rows if row.bytes)
