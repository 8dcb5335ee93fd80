# SPDX-License-Identifier: Apache-2.0
"""What is computed in pieces, as data and as a table: each stretch, and each large value that stays whole.

Sits on `evaluate`, which records the programs that it cuts.
"""

import collections
import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

from rich.table import Table

from ...jaxpr.source_lines import find_source_line
from ...text import format_bytes, make_table
from .evaluate import TiledProgram
from .program import SUM, Stretch, count_bytes
from .run_stretch import is_row_reduction
from .stretches import Uncut

# Primitives whose repetition in the backward pass takes time worth mentioning.
_HEAVY = ("dot_general", "conv_general_dilated", "ragged_dot_general", "custom_vjp_call", "pallas_call", "random_bits")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TiledStretch:
    """A stretch of equations that is computed in pieces.

    Attributes:
        module: Path of the module with the rule, or "@loss"; of equal modules, the first.
        largest: Type of its largest value, such as `f32[1,4096,128256]`.
        axis: The axis of that value along which it is cut.
        size: Length of the axis.
        pieces: Number of pieces.
        vanished: How many values no longer exist whole.
        vanished_bytes: Their size in bytes, all devices together, as if each existed.
        whole: Types of the values that every piece reads whole.
        summed: Types of the results that are added over the pieces.
        kept: Types of the rows' reductions that are kept for the backward pass.
        recomputed: Heavy operations that the backward pass computes again, with their number.
        source: File and line that compute the largest value; "" if unknown.
    """

    module: str
    largest: str
    axis: int
    size: int
    pieces: int
    vanished: int
    vanished_bytes: int
    whole: tuple[str, ...]
    summed: tuple[str, ...]
    kept: tuple[str, ...]
    recomputed: tuple[tuple[str, int], ...]
    source: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class UncutValue:
    """A large value that stays whole under a `Tile`.

    Attributes:
        module: Path of the module with the rule, or "@loss".
        value: Its type.
        bytes: Its size in bytes.
        reason: Why it is not cut.
        source: File and line of the operation that stands in the way; "" if unknown.
    """

    module: str
    value: str
    bytes: int
    reason: str
    source: str


def describe_programs(programs: Iterable[TiledProgram]) -> tuple[tuple[TiledStretch, ...], tuple[UncutValue, ...]]:
    """Return the stretches of recorded programs, and the large values that stay whole."""
    stretches: list[TiledStretch] = []
    uncut: list[UncutValue] = []
    for program in programs:
        found = [node for node in program.program.nodes if isinstance(node, Stretch)]
        stretches += [_describe_stretch(program, stretch) for stretch in found]
        uncut += [_describe_uncut(program, value) for value in program.uncut]
    return tuple(stretches), tuple(dict.fromkeys(uncut))


def _describe_stretch(program: TiledProgram, stretch: Stretch) -> TiledStretch:
    equations = [equation for equation, _ in stretch.cut_members]
    heavy = collections.Counter(e.primitive.name for e in equations if e.primitive.name in _HEAVY)
    rows = [
        equation.outvars[0]
        for equation, factor in stretch.cut_members
        if factor.kind == "map" and program.tile.keep_rows and is_row_reduction(equation)
    ]
    return TiledStretch(
        module=program.path,
        largest=_format_type(stretch.seed),
        axis=stretch.axis,
        size=stretch.size,
        pieces=stretch.pieces,
        vanished=len(stretch.vanished),
        vanished_bytes=sum(map(count_bytes, stretch.vanished)),
        whole=tuple(_format_type(var) for var, axis in stretch.inputs if axis is None),
        summed=tuple(_format_type(var) for var, place in stretch.outputs if place == SUM),
        kept=tuple(map(_format_type, rows)),
        recomputed=tuple(heavy.most_common()),
        source=_find_source(equations, stretch.seed),
    )


def _describe_uncut(program: TiledProgram, value: Uncut) -> UncutValue:
    return UncutValue(
        module=program.path,
        value=_format_type(value.var),
        bytes=count_bytes(value.var),
        reason=value.reason,
        source="" if value.equation is None else find_source_line(value.equation),
    )


def _find_source(equations: Sequence[Any], var: Any) -> str:
    return next((find_source_line(e) for e in equations if var in e.outvars), "")


def _format_type(var: Any) -> str:
    text: str = var.aval.str_short(short_dtypes=True)
    return text


def make_stretch_table(stretches: Sequence[TiledStretch]) -> Table:
    """Return stretches as a table, largest first."""
    rows = []
    for one in sorted(stretches, key=lambda one: -one.vanished_bytes):
        recomputed = ", ".join(f"{count} {name}" for name, count in one.recomputed)
        cells = [one.module, one.largest, f"{one.axis}: {one.size} in {one.pieces}", format_bytes(one.vanished_bytes)]
        rows.append([*cells, recomputed, one.source])
    return make_table(
        ("in pieces", "largest value", "axis", "vanishes", "computed again", "at"), rows, numeric=("vanishes",)
    )


def make_uncut_table(values: Sequence[UncutValue]) -> Table:
    """Return values that stay whole as a table."""
    rows = [[one.module, one.value, format_bytes(one.bytes), one.reason, one.source] for one in values]
    return make_table(("whole", "value", "size", "because", "at"), rows, numeric=("size",))
