# SPDX-License-Identifier: Apache-2.0
"""The live buffers at the peak of a compiled program, by module and operation.

Sits on `liveness`, which finds the buffers, and on `tracing`, which puts module paths into the scopes of the program.
Equal buffers of equal layers are one row.
"""

import dataclasses
import re
from collections.abc import Iterable
from typing import Literal

from ...rules.fold_paths import merge_rows
from ...rules.paths import format_path
from ...text import format_bytes
from ...tracing.origins import locate
from ...transform.naming import scopes
from .liveness import Buffer, find_live_buffers
from .program import HloProgram

Phase = Literal["forward", "recomputed", "backward"]

# Rows beyond this number become one, so that the rows always add up.
_MAX_ROWS = 40
_MAX_PRINTED = 10
_JIT = re.compile(r"\bp?jit\(([^()]*)\)")
# Where the compiler merged operations: what they share, and the rest of each name.
_MERGED = re.compile(r"^(.*?/)\((.*)\)$")
_BETWEEN_MERGED = re.compile(r"(?<!\brt):")
# Segments that JAX puts around operations and that say nothing to a reader.
_WRAPPERS = frozenset({"checkpoint", "rematted_computation", "closed_call", "core_call", "while", "body", "cond", ""})
# Segments of an operation that are shown: `_bernoulli/_uniform/shift_right_logical` says more than its end.
_MAX_SEGMENTS = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class LiveBuffer:
    """Equal buffers that are live at the peak of a compiled program, on one device.

    Attributes:
        path: Path of the module that computes them, with equal layers merged; "." if no module does.
        operation: The traced operation, such as `dot_general`, or in brackets the compiler's, such as `(copy)`.
        phase: Whether they are computed in the forward pass, computed again for the backward pass, or computed in the
            backward pass.
        shape: Dtype and shape on one device, such as `bf16[8,128]`.
        bytes: Size of all `count` buffers on one device, with the padding of their layout.
        count: Number of buffers in this row.
    """

    path: str
    operation: str
    phase: Phase
    shape: str
    bytes: int
    count: int = 1


def read_live_buffers(program: HloProgram) -> tuple[LiveBuffer, ...]:
    """Return the temporaries that are live when a compiled program needs most memory, largest first.

    Args:
        program: The compiled program.
    """
    sources = {one.name: one.op_name for lines in program.computations.values() for one in lines}
    rows = merge_rows(
        [_describe_buffer(buffer, sources) for buffer in find_live_buffers(program)],
        lambda one: (one.operation, one.phase, one.shape),
    )
    if len(rows) <= _MAX_ROWS:
        return tuple(rows)
    rest = rows[_MAX_ROWS:]
    return (
        *rows[:_MAX_ROWS],
        LiveBuffer(
            path=".",
            operation="(smaller buffers)",
            phase="forward",
            shape="",
            bytes=sum(row.bytes for row in rest),
            count=sum(row.count for row in rest),
        ),
    )


def _describe_buffer(buffer: Buffer, sources: dict[str, str]) -> LiveBuffer:
    instruction = buffer.instruction
    op_name = select_op_name(instruction.op_name)
    operation = find_operation(op_name)
    if not op_name:  # a copy that the compiler made has the name of what it copies
        op_name = select_op_name(next((sources[name] for name in instruction.operands if sources.get(name)), ""))
        operation = f"({instruction.opcode})"
    return LiveBuffer(
        path=format_path(locate([op_name])[0]),
        operation=operation,
        phase=find_phase(op_name),
        shape=str(buffer.array),
        bytes=buffer.bytes,
    )


def select_op_name(op_name: str) -> str:
    """Return one traced operation of an `op_name`, which names several if the compiler merged them.

    Args:
        op_name: Scopes and operation; merged ones are joined by `;`, or are `scopes/(first:second)`.
    """
    first = op_name.partition(";")[0]
    merged = _MERGED.match(first)
    return first if merged is None else merged[1] + _BETWEEN_MERGED.split(merged[2])[-1]


def find_operation(op_name: str) -> str:
    """Return the traced operation of an `op_name`, with the functions around it inside its module.

    Args:
        op_name: Scopes and one operation, such as `jit(f)/jvp(rt:layers.0)/jit(_uniform)/add`.
    """
    segments = _JIT.sub(r"\1", op_name).split("/")
    scoped = [place for place, segment in enumerate(segments) if "rt:" in segment or segment == scopes.REGION]
    inside = segments[scoped[-1] + 1 :] if scoped else segments[1:] or segments
    named = [segment for segment in inside if segment not in _WRAPPERS and "(" not in segment]
    return "/".join((named or segments[-1:])[-_MAX_SEGMENTS:])


def find_phase(op_name: str) -> Phase:
    """Return the pass that an operation belongs to, by the scopes that JAX puts around it."""
    if "rematted_computation" in op_name:
        return "recomputed"
    return "backward" if "transpose(" in op_name else "forward"


def format_live_buffers(live: Iterable[LiveBuffer], temp_bytes: int, fragmentation_bytes: int = 0) -> list[str]:
    """Return lines for people: the largest rows, and what the compiler counts beyond all of them.

    Args:
        live: The live buffers at the peak.
        temp_bytes: The compiler's temporaries.
        fragmentation_bytes: The part of them that lies unused between buffers.
    """
    rows = list(live)
    explained = sum(row.bytes for row in rows)
    difference = temp_bytes - explained - fragmentation_bytes
    parts = [f"{format_bytes(explained)} of {format_bytes(temp_bytes)} temp"]
    if fragmentation_bytes:
        parts.append(f"{format_bytes(fragmentation_bytes)} between buffers")
    kind = "not explained" if difference >= 0 else "too much, since the compiler reuses more memory"
    parts.append(f"{format_bytes(abs(difference))} {kind}")
    lines = [f"live at the peak of the compiled program: {', '.join(parts)}"]
    for row in rows[:_MAX_PRINTED]:
        times = f" x{row.count}" if row.count > 1 else ""
        lines.append(f"  {format_bytes(row.bytes):>11}  {row.path}  {row.operation}  {row.shape}{times}  {row.phase}")
    if len(rows) > _MAX_PRINTED:
        smaller = rows[_MAX_PRINTED:]
        lines.append(f"  {format_bytes(sum(row.bytes for row in smaller)):>11}  {len(smaller)} smaller rows")
    return lines
