# SPDX-License-Identifier: Apache-2.0
"""One stretch over the whole batch: gradient accumulation for an unedited loss.

Sits on `spread`. Everything that depends on the batch has to be independent along its leading axis, up to sums; where
rows are mixed (batch normalisation, contrastive losses, global norms) it is refused, with the operation that does it.
"""

from collections.abc import Sequence
from typing import Any

from ...errors import RuleError
from ...jaxpr import jaxprs
from ...jaxpr.axes.rules import is_sharded
from ...jaxpr.source_lines import find_source_line
from ...rules.tile import Tile
from .border import find_vanished
from .program import Program, count_bytes
from .spread import Spread, spread_axis
from .stretches import build_stretch


def make_batch_stretch(program: Program, tile: Tile, batch: Sequence[Any]) -> Program:
    """Return the program with one stretch of everything that depends on the batch.

    Args:
        program: In normal form.
        tile: Number of pieces.
        batch: Variables of the arrays whose leading axis is the batch.

    Raises:
        RuleError: If the arrays differ in length, an explicit mesh divides their leading axis, an operation mixes rows,
            or the batch is shorter than the pieces.
    """
    size = _measure_batch(batch)
    pieces = tile.count_pieces(size)
    if pieces < 2:
        raise RuleError(
            what=f"a batch of {size} cannot be cut into pieces of {tile.rows} rows.",
            why="one piece would be the whole batch.",
            fix=f"Tile(rows={max(size // 2, 1)}, axis='batch'), or no Tile.",
        )
    spread = spread_axis(program, [(var, 0) for var in batch])
    members = _collect_members(program, spread, set(batch))
    if not members:
        return program
    members |= _collect_producers(program, spread, members)
    vanished = find_vanished(program, spread, members)
    seed = max(vanished or batch, key=count_bytes)
    stretch = build_stretch(program, spread, frozenset(members), vanished, seed, 0, pieces, size=size)
    return program.replace_by_stretch(stretch, members)


def _measure_batch(batch: Sequence[Any]) -> int:
    lengths = {var.aval.shape[0] if var.aval.shape else 0 for var in batch}
    if len(lengths) != 1 or 0 in lengths:
        shapes = ", ".join(var.aval.str_short() for var in batch) or "none"
        raise RuleError(
            what=f"the arrays of the batch have no leading axis in common: {shapes}.",
            why='axis="batch" cuts every array that is passed beside the model along its leading axis.',
            fix="pass arrays of one batch; what is not part of it belongs into the model, or is closed over.",
        )
    divided = [var for var in batch if is_sharded(var.aval, 0)]
    if divided:
        raise RuleError(
            what=f"the batch {divided[0].aval.str_short()} cannot be cut: an explicit mesh divides its leading axis.",
            why="each piece would lie on some of the devices.",
            fix="accumulate inside shard_map, where each device has its own rows, or use fewer rows for each device.",
        )
    return int(lengths.pop())


def _collect_members(program: Program, spread: Spread, batch: set[Any]) -> set[int]:
    """Return the equations that depend on rows of the batch."""
    rows, after = set(batch), set[Any]()
    members: set[int] = set()
    for number, node in enumerate(program.nodes):
        read = set(jaxprs.collect_variables(node.invars))
        if read & rows:
            factor = spread.factors.get(number)
            operands = () if factor is None else zip(node.invars, factor.operands, strict=True)
            cut = {atom for atom, axis in operands if axis is not None}
            if factor is None or not (read & rows) <= cut:
                raise _make_mixing_error(node)
            if read & after:
                raise _make_mixing_error(_find_sum(program, read & after))
            members.add(number)
            (after if factor.kind == "sum" else rows).update(node.outvars)
        elif read & after:
            after.update(node.outvars)
    return members


def _collect_producers(program: Program, spread: Spread, members: set[int]) -> set[int]:
    """Return the equations that make rows for members from nothing, such as random bits and counters."""
    found: set[int] = set()
    for number in range(len(program.nodes) - 1, -1, -1):
        node, factor = program.nodes[number], spread.factors.get(number)
        if number in members or factor is None or factor.kind != "map" or not program.results.isdisjoint(node.outvars):
            continue
        readers = program.find_readers(number)
        placed = all(spread.places.get(var) == axis for var, axis in zip(node.outvars, factor.results, strict=True))
        if readers and placed and all(reader in members or reader in found for reader in readers):
            found.add(number)
    return found


def _find_sum(program: Program, values: set[Any]) -> Any:
    """Return the equation of the sum over the batch that one of the values depends on."""
    number = min(program.producers[value] for value in values)
    ancestors = [number, *sorted(program.find_ancestors([number]), reverse=True)]
    sums = [program.nodes[n] for n in ancestors if program.nodes[n].primitive.name in ("reduce_sum", "dot_general")]
    return sums[0] if sums else program.nodes[number]


def _make_mixing_error(equation: Any) -> RuleError:
    line = find_source_line(equation)
    return RuleError(
        what=f"the batch cannot be cut: {equation.primitive.name}{f' ({line})' if line else ''} mixes its rows.",
        why="a piece of the batch would compute something else than the whole batch does.",
        fix="Tile() without axis cuts what is independent and leaves this whole.",
    )
