# SPDX-License-Identifier: Apache-2.0
"""Rules of primitives that compute values from positions: iota and random bits, and those that handle keys.

A threefry key's bits are a function of an element's flat index, if `jax_threefry_partitionable` is set, so a piece
computes the same bits as the whole. Bits of other generators depend on everything drawn with them.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import primitives

from ..factor import Factor, Piece
from ..rule import Rule, get_operand_shapes, get_result_shapes, make_positions, put_on_axis


def _find_iota(equation: Any) -> Iterator[Factor]:
    if not equation.invars:  # else the sizes are not known while tracing
        for axis in range(len(equation.params["shape"])):
            yield Factor((), (axis,))


def _compute_iota(equation: Any, factor: Factor, operands: Sequence[Any], piece: Piece) -> list[Any]:
    params, (axis,) = equation.params, factor.results
    assert axis is not None
    shape = list(params["shape"])
    positions = make_positions(piece, shape[axis])
    shape[axis] = piece.measure(shape[axis])
    whole = {"dtype": params["dtype"], "shape": tuple(shape), "dimension": params["dimension"]}
    if axis != params["dimension"]:
        return [primitives.iota_p.bind(**whole, sharding=params["sharding"])]
    values = lax.convert_element_type(positions, params["dtype"])
    return [lax.broadcast_in_dim(values, shape, (axis,), out_sharding=params["sharding"])]


def _find_random_bits(equation: Any) -> Iterator[Factor]:
    if not _is_threefry(equation):
        return
    (keys,), (result,) = get_operand_shapes(equation), get_result_shapes(equation)
    for axis in range(len(result)):
        if axis < len(keys):
            yield Factor((axis,), (axis,))
        elif equation.ctx.threefry_partitionable:
            yield Factor((None,), (axis,))


def _is_threefry(equation: Any) -> bool:
    return any(str(getattr(atom.aval, "dtype", "")) == "key<fry>" for atom in (*equation.invars, *equation.outvars))


def _compute_random_bits(equation: Any, factor: Factor, operands: Sequence[Any], piece: Piece) -> list[Any]:
    shape, (axis,), (keys,) = equation.params["shape"], factor.results, operands
    assert axis is not None
    if factor.operands[0] is not None:
        return [primitives.random_bits_p.bind(keys, **equation.params)]
    drawn = axis - keys.ndim
    positions = [
        make_positions(piece, length) if number == drawn else lax.iota(jnp.int32, length)
        for number, length in enumerate(shape)
    ]
    high, low = _compute_flat_index(positions, shape)
    part = (*keys.shape, *high.shape)
    halves = jax.random.key_data(keys).reshape(*keys.shape, *[1] * len(shape), 2)
    counts = (halves[..., 0], halves[..., 1], high, low)
    first, second = primitives.threefry2x32_p.bind(*(jnp.broadcast_to(count, part) for count in counts))
    dtype = equation.outvars[0].aval.dtype
    if equation.params["bit_width"] == 64:
        first, second = (lax.convert_element_type(half, dtype) for half in (first, second))
        return [lax.shift_left(first, jnp.asarray(32, dtype)) | second]
    return [lax.convert_element_type(first ^ second, dtype)]


def _compute_flat_index(positions: Sequence[jax.Array], shape: Sequence[int]) -> tuple[jax.Array, jax.Array]:
    """Return the high and low halves of the flat indices of elements of an array, uint32, without 64-bit integers."""
    rank = len(shape)
    high = low = jnp.zeros((1,) * rank, jnp.uint32)
    for axis, position in enumerate(positions):
        rows = put_on_axis(position.astype(jnp.uint32), axis, rank)
        more_high, more_low = _multiply(rows, math.prod(shape[axis + 1 :]), math.prod(shape))
        total = low + more_low
        high = high + more_high + (total < low).astype(jnp.uint32)
        low = total
    sizes = tuple(position.shape[0] for position in positions)
    return jnp.broadcast_to(high, sizes), jnp.broadcast_to(low, sizes)


def _multiply(rows: jax.Array, stride: int, limit: int) -> tuple[jax.Array, jax.Array]:
    """Return the high and low halves of the products of uint32 values and a stride that stay below `limit`."""
    stride_high, stride_low = (jnp.uint32(half) for half in divmod(stride, 2**32))
    low = rows * stride_low
    if limit <= 2**32:
        return jnp.zeros_like(low), low
    # Products of 16-bit digits fit into 32 bits; what the two middle ones and the lowest carry goes into the high half.
    (row_1, row_0), (digit_1, digit_0) = _split_digits(rows), _split_digits(stride_low)
    middle = [row_1 * digit_0, row_0 * digit_1]
    carried = (row_0 * digit_0 >> 16) + (middle[0] & 0xFFFF) + (middle[1] & 0xFFFF)
    high = row_1 * digit_1 + (middle[0] >> 16) + (middle[1] >> 16) + (carried >> 16)
    return high + rows * stride_high, low


def _split_digits(value: jax.Array) -> tuple[jax.Array, jax.Array]:
    return value >> 16, value & 0xFFFF


def _find_key_axes(equation: Any) -> Iterator[Factor]:
    """Yield the axes of arrays of threefry keys, which operations on keys treat one by one."""
    if not _is_threefry(equation):
        return
    keys = next(atom.aval.shape for atom in (*equation.invars, *equation.outvars) if str(atom.aval.dtype) == "key<fry>")
    shapes = get_operand_shapes(equation)
    for axis, length in enumerate(keys):
        operands = tuple(axis if len(shape) > axis and shape[axis] == length else None for shape in shapes)
        yield Factor(operands, (axis,))


RULES = {
    "iota": Rule(_find_iota, compute=_compute_iota),
    "random_bits": Rule(_find_random_bits, compute=_compute_random_bits),
    **{
        name: Rule(_find_key_axes)
        for name in ("random_clone", "random_fold_in", "random_seed", "random_split", "random_unwrap", "random_wrap")
    },
}
