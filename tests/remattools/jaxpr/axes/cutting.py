# SPDX-License-Identifier: Apache-2.0
"""Cut each equation of a program along each factor and compare with the whole equation: values and gradients."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from remattools import compat
from remattools.jaxpr import jaxprs
from remattools.jaxpr.axes.factor import Piece
from remattools.jaxpr.axes.pieces import run_piece
from remattools.jaxpr.axes.rules import find_factors

TOLERANCE = 1e-12


def run_equations(program, arguments):
    """Yield each equation of a closed jaxpr with the values of its operands; `jit`s are inlined."""
    inner = jaxprs.open_jaxpr(program)
    values = dict(zip(inner.constvars, program.consts)) | dict(zip(inner.invars, arguments))
    for equation in inner.eqns:
        operands = [jaxprs.read_atom(atom, values) for atom in equation.invars]
        if equation.primitive.name == "jit":
            results = yield from run_equations(equation.params["jaxpr"], operands)
        else:
            yield equation, operands
            results = compat.bind(equation, operands, equation.params)
        values.update(zip(equation.outvars, results))
    return [jaxprs.read_atom(atom, values) for atom in inner.outvars]


def find_equation(function, *arguments, name):
    """Return the first equation of a primitive in a traced function, and the values of its operands."""
    program = jax.make_jaxpr(function)(*arguments)
    return next(found for found in run_equations(program, arguments) if found[0].primitive.name == name)


def measure_axes(equation, factor):
    """Return the smallest length of the axes of a factor."""
    atoms = (*equation.invars, *equation.outvars)
    places = (*factor.operands, *factor.results)
    return min(atom.aval.shape[axis] for atom, axis in zip(atoms, places) if axis is not None)


def cut_rows(value, axis, piece):
    """Return the rows of a piece; beyond the end copies of the last row of `piece.size`."""
    per_row = value.shape[axis] // piece.size
    start, stop = piece.index * piece.rows, min((piece.index + 1) * piece.rows, piece.size)
    rows = jax.lax.slice_in_dim(value, start * per_row, stop * per_row, axis=axis)
    last = jax.lax.slice_in_dim(value, (piece.size - 1) * per_row, piece.size * per_row, axis=axis)
    missing = piece.rows - (stop - start)
    return jax.lax.concatenate([rows, *[last] * missing], axis) if missing else rows


def run_in_pieces(equation, factor, operands, rows, size=None):
    """Compute all pieces of an equation and join or add them.

    Args:
        equation: The equation.
        factor: One of its factors.
        operands: Values of its operands.
        rows: Rows in a piece.
        size: Rows in all pieces, a divisor of the lengths of all axes; None for the shortest.
    """
    size = measure_axes(equation, factor) if size is None else size
    parts = []
    for index in range(-(-size // rows)):
        piece = Piece(index, rows, size)
        cut = [
            value if axis is None else cut_rows(value, axis, piece) for value, axis in zip(operands, factor.operands)
        ]
        parts.append(run_piece(equation, factor, cut, Piece(jnp.int32(index), rows, size)))
    joined = []
    for values, axis, var in zip(zip(*parts), factor.results, equation.outvars):
        if axis is None:
            total = values[0]
            for value in values[1:]:
                total = total + value
            joined.append(total)
        else:
            whole = jax.lax.concatenate(list(values), axis)
            joined.append(jax.lax.slice_in_dim(whole, 0, var.aval.shape[axis], axis=axis))
    return joined


def list_rows(size):
    """Return numbers of rows of a piece: one that divides all rows and one that does not, if there is one."""
    divisors = [rows for rows in range(1, size) if size % rows == 0]
    others = [rows for rows in range(2, size) if size % rows]
    return [divisors[-1], *others[-1:]]


def list_cuts(length):
    """Return rows of a piece and of all pieces for an axis of a length."""
    return [(rows, length) for rows in list_rows(length)]


def choose_cut(rng):
    """Return a function that returns one random cut, also with rows that stand for several rows of the axis."""

    def choose(length):
        sizes = [size for size in range(2, length) if length % size == 0]
        cuts = [*list_cuts(length), *((1, size) for size in sizes)]
        return [cuts[rng.integers(len(cuts))]]

    return choose


def check_equation(equation, operands, *, gradients=True, choose=list_cuts):
    """Check that an equation in pieces is the whole equation, along each of its factors.

    Args:
        equation: The equation.
        operands: Values of its operands.
        gradients: Whether to compare gradients, too.
        choose: Returns for the length of an axis pairs to try: rows of a piece, and of all pieces.

    Returns:
        The number of factors.
    """
    factors = find_factors(equation)
    cuts = [(factor, *cut) for factor in factors for cut in choose(measure_axes(equation, factor))]
    is_input = [
        jnp.issubdtype(atom.aval.dtype, jnp.inexact) and not isinstance(atom, core.Literal) for atom in equation.invars
    ]
    is_differentiable = gradients and any(is_input) and _has_gradient(equation, operands, is_input)

    def evaluate(function, values):
        """Return the results, and the gradients with respect to floating-point operands."""

        def run_with(*inputs):
            rest = iter(inputs)
            results = function([next(rest) if use else value for use, value in zip(is_input, values)])
            return [result for result in results if jnp.issubdtype(result.dtype, jnp.inexact)]

        if not is_differentiable:
            return function(values), ()
        results, pull = jax.vjp(run_with, *[value for use, value in zip(is_input, values) if use])
        return function(values), pull([make_like(result, number) for number, result in enumerate(results)])

    def evaluate_all(values):
        whole = evaluate(lambda values: compat.bind(equation, values, equation.params), values)
        return whole, [
            evaluate(lambda values, cut=cut: run_in_pieces(equation, cut[0], values, *cut[1:]), values) for cut in cuts
        ]

    # One program for all cuts of an equation: compiling takes most of the time.
    arrays = [None if isinstance(atom, core.Literal) else value for atom, value in zip(equation.invars, operands)]
    (expected, pulled), actual = jax.jit(
        lambda given: evaluate_all([value if new is None else new for new, value in zip(given, operands)])
    )(arrays)
    for (factor, rows, size), (values, gradients_) in zip(cuts, actual):
        place = f"{equation.primitive.name} {factor} {rows} of {size} {[str(atom.aval) for atom in equation.invars]}"
        compare(expected, values, place)
        compare(pulled, gradients_, f"{place} gradients")
    return len(factors)


def _has_gradient(equation, operands, is_input):
    """Return whether JAX can differentiate an equation."""
    inputs = [value for use, value in zip(is_input, operands) if use]

    def run_with(*inputs):
        rest = iter(inputs)
        values = [next(rest) if use else value for use, value in zip(is_input, operands)]
        results = compat.bind(equation, values, equation.params)
        return sum(jnp.sum(jnp.abs(result)) for result in results if jnp.issubdtype(result.dtype, jnp.inexact))

    try:
        jax.eval_shape(jax.grad(run_with, argnums=tuple(range(len(inputs)))), *inputs)
    except (NotImplementedError, TypeError, ValueError):  # no rule, or results that are all integers
        return False
    return True


def make_like(value, seed):
    """Return a random array of the shape, dtype and sharding of a value."""
    array = jnp.asarray(np.random.default_rng(seed).normal(size=value.shape), value.dtype)
    sharding = jax.typeof(value).sharding
    return jax.sharding.reshard(array, sharding) if any(sharding.spec) else array


def compare(expected, actual, place):
    """Assert that values are equal: floating-point ones within 1e-12, others exactly."""
    assert len(expected) == len(actual), place
    for one, other in zip(expected, actual):
        assert one.shape == other.shape, (place, one.shape, other.shape)
        assert one.dtype == other.dtype, (place, one.dtype, other.dtype)
        if jnp.issubdtype(one.dtype, jax.dtypes.prng_key):
            one, other = jax.random.key_data(one), jax.random.key_data(other)
        one, other = np.asarray(one), np.asarray(other)
        if not np.issubdtype(one.dtype, np.inexact):
            np.testing.assert_array_equal(one, other, err_msg=place)
        else:
            scale = max(1.0, float(np.max(np.abs(one), initial=0, where=np.isfinite(one))))
            np.testing.assert_allclose(one, other, rtol=TOLERANCE, atol=TOLERANCE * scale, err_msg=place)


def draw(shape, seed=0):
    """Return a float64 array."""
    return jnp.asarray(np.random.default_rng(seed + math.prod(shape)).normal(size=shape))


def describe(factor):
    """Return a factor as a string: "0 . -> 0" is a map of the first operand's axis 0, with the second operand whole."""
    operands, results = (
        " ".join("." if axis is None else str(axis) for axis in places) for places in (factor.operands, factor.results)
    )
    return f"{operands} -> {'sum' if factor.kind == 'sum' else results}".strip()


def check(function, *arguments, name, expected, gradients=True):
    """Check the factors of the first equation of a primitive in a function, and that its pieces are the whole.

    Args:
        function: A function of arrays.
        arguments: Its arguments.
        name: The name of the primitive.
        expected: The factors, as by `describe`.
        gradients: Whether to compare gradients, too.
    """
    equation, operands = find_equation(function, *arguments, name=name)
    assert [describe(factor) for factor in find_factors(equation)] == expected
    check_equation(equation, operands, gradients=gradients)
