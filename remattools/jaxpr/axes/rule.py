# SPDX-License-Identifier: Apache-2.0
"""The rule of a primitive: which factors it has, and how one piece of it is computed.

The files in `primitives/` hold a table `RULES` by the primitive's name; `rules` joins them.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from .factor import Axis, Factor, Piece

# Parameters of one piece of an equation, by the equation, the factor and the piece.
type Adjust = Callable[[Any, Factor, Piece], Mapping[str, Any]]
# Values of the results of one piece; the operands stand before the piece.
type Compute = Callable[[Any, Factor, Sequence[Any], Piece], Sequence[Any]]


@dataclasses.dataclass(frozen=True)
class Rule:
    """How equations of one primitive are cut.

    Attributes:
        find: Returns the factors of an equation; those of axes shorter than two are dropped later.
        adjust: Returns the parameters for a piece; None where they do not depend on shapes.
        compute: Computes a piece by other primitives; None to bind the equation's own.
    """

    find: Callable[[Any], Iterable[Factor]]
    adjust: Adjust | None = None
    compute: Compute | None = None


def get_operand_shapes(equation: Any) -> list[tuple[int, ...]]:
    """Return the shapes of the operands of an equation."""
    return [tuple(atom.aval.shape) for atom in equation.invars]


def get_result_shapes(equation: Any) -> list[tuple[int, ...]]:
    """Return the shapes of the results of an equation."""
    return [tuple(var.aval.shape) for var in equation.outvars]


def make_map(equation: Any, operand: Axis, result: int, others: Axis = None) -> Factor:
    """Return a factor of kind "map" for an equation with one result whose first operand is the one with the axis.

    Args:
        equation: The equation.
        operand: Position of the axis in the first operand.
        result: Its position in the result.
        others: Its position in each other operand.
    """
    return Factor((operand, *[others] * (len(equation.invars) - 1)), (result,))


def is_padded(piece: Piece) -> bool:
    """Return whether the last piece goes beyond the end of the axis."""
    return bool(piece.size % piece.rows)


def make_positions(piece: Piece, length: int) -> jax.Array:
    """Return the rows of an axis of `length` that are in a piece, int32; beyond the end the last, as in operands."""
    positions = _count_positions(piece, length)
    return jnp.minimum(positions, length - 1) if is_padded(piece) else positions


def mask_rows(value: Any, axis: int, piece: Piece, length: int) -> Any:
    """Return a piece of a value with zeros beyond the end of an axis of `length`."""
    is_row = _count_positions(piece, length) < length
    return jnp.where(put_on_axis(is_row, axis, value.ndim), value, jnp.zeros((), value.dtype))


def put_on_axis(vector: jax.Array, axis: int, rank: int) -> jax.Array:
    """Return a vector as an array of `rank` axes of which only `axis` is longer than one."""
    return lax.expand_dims(vector, [other for other in range(rank) if other != axis])


def _count_positions(piece: Piece, length: int) -> jax.Array:
    rows = piece.measure(length)
    return jnp.asarray(piece.index, jnp.int32) * rows + lax.iota(jnp.int32, rows)
