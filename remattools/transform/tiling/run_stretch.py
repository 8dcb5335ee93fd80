# SPDX-License-Identifier: Apache-2.0
"""Compute one stretch: a scan over its pieces, each of them rematerialised.

Sits on `program`. The backward pass is JAX's own of this scan, so every transform works: it computes each piece again,
piece by piece, and adds the gradients of what all pieces read.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from ... import compat
from ...jaxpr import jaxprs
from ...jaxpr.axes.factor import Piece
from ...jaxpr.axes.pieces import run_piece
from ...rules.tile import Tile
from ..naming.names import OFFLOADED, SAVED, TILE_RESULT, TILE_ROW
from .program import SUM, Stretch, is_variable

# A reduction counts as one per row if its result is this much smaller than what it reads.
_ROW_SHARE = 16
_ROW_REDUCTIONS = ("reduce_sum", "reduce_max", "reduce_min", "argmax", "argmin")


def run_stretch(stretch: Stretch, values: Mapping[Any, Any], tile: Tile) -> list[Any]:
    """Return the values of a stretch's outputs.

    Args:
        stretch: The stretch.
        values: Values of the variables that it reads.
        tile: How gradients are added, and whether rows are kept.
    """
    whole = [var for var, axis in stretch.inputs if axis is None]
    cut: list[tuple[Any, int]] = [(var, axis) for var, axis in stretch.inputs if axis is not None]
    consts = [_prepare_whole(values[var], tile) for var in whole]
    slices = [_split(values[var], axis, stretch) for var, axis in cut]
    sums = [var for var, place in stretch.outputs if place == SUM]

    def compute(consts: list[Any], index: Any, slices: list[Any]) -> tuple[list[Any], list[Any]]:
        known: dict[Any, Any] = {(var, None): _get_whole(value) for var, value in zip(whole, consts, strict=True)}
        known.update(zip(cut, slices, strict=True))
        results = _run_members(stretch, known, index, tile)
        return (
            [results[var] for var, place in stretch.outputs if place != SUM],
            [results[var].astype(_choose_sum_dtype(var.aval.dtype)) for var in sums],
        )

    policy = jax.checkpoint_policies.save_only_these_names(TILE_ROW) if tile.keep_rows else None
    compute = jax.checkpoint(compute, policy=policy, prevent_cse=False)

    def step(carry: list[Any], inputs: tuple[Any, list[Any]]) -> tuple[list[Any], list[Any]]:
        rows, parts = compute(consts, *inputs)
        return [total + part for total, part in zip(carry, parts, strict=True)], rows

    zeros = [compat.make_zeros(var.aval, _choose_sum_dtype(var.aval.dtype)) for var in sums]
    totals, rows = jax.lax.scan(step, zeros, (jnp.arange(stretch.pieces, dtype=jnp.int32), slices))
    found = iter(rows)
    added = dict(zip(sums, totals, strict=True))
    return [
        checkpoint_name(
            added[var].astype(var.aval.dtype) if place == SUM else _join(next(found), place, var.aval.shape[place]),
            TILE_RESULT,
        )
        for var, place in stretch.outputs
    ]


def _run_members(stretch: Stretch, known: dict[Any, Any], index: Any, tile: Tile) -> dict[Any, Any]:
    """Compute one piece: the values by variable."""
    piece = Piece(index, stretch.rows, stretch.size)
    made: dict[Any, Any] = {}
    for equation, factor in zip(stretch.members, stretch.factors, strict=True):
        axes = [None] * len(equation.invars) if factor is None else factor.operands
        operands = [
            (made[atom] if atom in made else known[atom, axis]) if is_variable(atom) else atom.val
            for atom, axis in zip(equation.invars, axes, strict=True)
        ]
        if jaxprs.get_checkpoint_name(equation) in (SAVED, OFFLOADED):
            results = operands  # a value that never exists whole is not kept
        elif factor is None:
            results = compat.bind(equation, operands, equation.params)
        else:
            results = run_piece(equation, factor, operands, piece)
            if tile.keep_rows and factor.kind == "map" and is_row_reduction(equation):
                results = [checkpoint_name(result, TILE_ROW) for result in results]
        made.update(zip(equation.outvars, results, strict=True))
    return made


def is_row_reduction(equation: Any) -> bool:
    """Whether an equation reduces long rows, such as the maximum or the sum of a softmax."""
    if equation.primitive.name not in _ROW_REDUCTIONS:
        return False
    source, result = (jaxprs.count_aval_bytes(atom.aval) for atom in (equation.invars[0], equation.outvars[0]))
    return result * _ROW_SHARE <= source


def _choose_sum_dtype(dtype: Any) -> Any:
    """The dtype in which parts of a sum are added."""
    return jnp.promote_types(dtype, jnp.float32) if jnp.issubdtype(dtype, jnp.floating) else dtype


def _split(value: Any, axis: int, stretch: Stretch) -> Any:
    """Return the pieces of an array along a new leading axis; beyond the end the last row is repeated.

    Copies of a row that occurs cannot be the only ones that give NaN or infinity.
    """
    shape, rows = value.shape, value.shape[axis] * stretch.rows // stretch.size
    missing = rows * stretch.pieces - shape[axis]
    if missing:
        last = jax.lax.slice_in_dim(value, shape[axis] - 1, shape[axis], axis=axis)
        copies = jax.lax.broadcast_in_dim(last, (*shape[:axis], missing, *shape[axis + 1 :]), range(len(shape)))
        value = jax.lax.concatenate([value, copies], axis)
    pieces = jax.lax.reshape(value, (*shape[:axis], stretch.pieces, rows, *shape[axis + 1 :]))
    return jnp.moveaxis(pieces, axis, 0)


def _join(pieces: Any, axis: int, size: int) -> Any:
    moved = jnp.moveaxis(pieces, 0, axis)
    shape = moved.shape
    value = jax.lax.reshape(moved, (*shape[:axis], shape[axis] * shape[axis + 1], *shape[axis + 2 :]))
    return value if value.shape[axis] == size else jax.lax.slice_in_dim(value, 0, size, axis=axis)


def _prepare_whole(value: Any, tile: Tile) -> tuple[Any, Any]:
    """Return a value that all pieces read, with its wider copy whose gradient is added over the pieces.

    The copy is never read, so the compiler drops it. It gives the sum of the gradients a dtype of its own, which a
    loop's carry otherwise takes from the value.
    """
    if tile.accumulate is None or not jnp.issubdtype(value.dtype, jnp.floating):
        return value, None
    wide = jnp.promote_types(value.dtype, tile.accumulate)
    if wide == value.dtype:
        return value, None
    return jax.lax.stop_gradient(value), value.astype(wide)


def _get_whole(prepared: tuple[Any, Any]) -> Any:
    value, wide = prepared
    return value if wide is None else _take_gradient_of(value, wide)


@jax.custom_jvp
def _take_gradient_of(value: Any, wide: Any) -> Any:
    """Return `value`, whose gradient is that of `wide`."""
    del wide
    return value


@_take_gradient_of.defjvp
def _differentiate(primals: tuple[Any, Any], tangents: tuple[Any, Any]) -> tuple[Any, Any]:
    value, _ = primals
    return value, tangents[1].astype(value.dtype)
