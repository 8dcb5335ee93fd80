# SPDX-License-Identifier: Apache-2.0
"""A piece is computed as its equation would be: under the current trace, with the equation's names."""

import doctest

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from remattools import compat
from remattools.jaxpr import jaxprs
from remattools.jaxpr.axes import pieces, rules
from remattools.jaxpr.axes.factor import Piece
from remattools.jaxpr.axes.pieces import run_piece
from remattools.jaxpr.axes.rules import find_factors

from .cutting import (
    check_equation,
    choose_cut,
    compare,
    draw,
    find_equation,
    list_rows,
    measure_axes,
    run_equations,
    run_in_pieces,
)
from .drawing import normalize


def _trace_pieces(function, *arguments, name):
    """Return a program that computes a piece of two rows along the first factor, inside the scope "outer"."""
    equation, operands = find_equation(function, *arguments, name=name)
    factor = find_factors(equation)[0]

    @jax.named_scope("outer")
    def run(index, operands):
        cut = [value if axis is None else value[:2] for value, axis in zip(operands, factor.operands)]
        return run_piece(equation, factor, cut, Piece(index, 2, 4))

    return jax.make_jaxpr(run)(jnp.int32(1), operands)


@pytest.mark.parametrize(
    ("name", "function"),
    [
        pytest.param("sin", lambda x: jnp.sin(x), id="bound"),
        pytest.param("random_bits", lambda x: jax.random.bits(jax.random.key(0), x.shape), id="computed-otherwise"),
        pytest.param("custom_jvp_call", lambda x: jax.nn.relu6(x), id="custom-derivative"),
    ],
)
def test_names_of_the_place_and_of_the_equation_are_joined(name, function):
    program = _trace_pieces(jax.named_scope("inner")(function), draw((4, 3)), name=name)
    stacks = {str(equation.source_info.name_stack) for equation in program.eqns}
    assert "outer/inner" in stacks


def test_source_lines_are_those_of_the_equation():
    def function(x):
        return jnp.sin(x)

    program = _trace_pieces(function, draw((4, 3)), name="sin")
    (equation,) = [each for each in program.eqns if each.primitive.name == "sin"]
    frames = equation.source_info.traceback.as_python_traceback()
    names = []
    while frames is not None:
        names.append(frames.tb_frame.f_code.co_name)
        frames = frames.tb_next
    assert "function" in names


def test_a_piece_is_as_the_program_cut_by_hand():
    program = _trace_pieces(lambda x: x * 2, draw((4, 3)), name="mul")
    (result,) = jaxprs.run(program, [jnp.int32(0), draw((4, 3)), jnp.float64(2)])[:1]
    np.testing.assert_array_equal(result, draw((4, 3))[:2] * 2)


@pytest.mark.parametrize("name", ["reduce_sum", "dot_general"])
def test_sums_would_count_rows_beyond_the_end_without_a_mask(monkeypatch, name):
    """Control."""
    function = jnp.dot if name == "dot_general" else lambda x, y: x.sum(1)
    equation, operands = find_equation(function, draw((2, 6)), draw((6, 3)), name=name)
    check_equation(equation, operands)
    monkeypatch.setattr(pieces, "_mask_operands", lambda equation, factor, operands, piece: operands)
    with pytest.raises(AssertionError):
        check_equation(equation, operands)


def _attend(x, w):
    """Return rows of an attention by position, after a norm with weights."""
    h = normalize(x, w)
    scores = jnp.einsum("btd,bsd->bts", h, h)
    is_late = jax.lax.broadcasted_iota(jnp.int32, (6, 6), 0) < jax.lax.broadcasted_iota(jnp.int32, (6, 6), 1)
    return jnp.where(is_late, jnp.exp(scores), 0).sum(1)


def test_sharded_axes_stay_whole_and_the_others_are_cut():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        x = jax.device_put(draw((4, 6, 2)), NamedSharding(mesh, PartitionSpec("data")))
        program = jax.make_jaxpr(_attend)(x, draw((2,)))
        rng = np.random.default_rng(0)
        counts = [check_equation(*found, choose=choose_cut(rng)) for found in run_equations(program, (x, draw((2,))))]
    assert sum(counts) > 15


def test_pieces_inside_a_shard_map():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))

    def compute(x, w, is_cut):
        w = jax.lax.pcast(w, "data", to="varying")
        program = jax.make_jaxpr(_attend)(*(compat.make_abstract(jax.typeof(value)) for value in (x, w)))
        totals = []
        for equation, operands in run_equations(program, (x, w)):
            for factor in find_factors(equation):
                rows = list_rows(measure_axes(equation, factor))[-1]
                results = compat.bind(equation, operands, equation.params)
                if is_cut:
                    results = run_in_pieces(equation, factor, operands, rows)
                totals += [
                    (result * jnp.cos(jnp.arange(result.size).reshape(result.shape))).sum() for result in results
                ]
        return jnp.stack([total + 0 * x[0, 0, 0] for total in totals])

    def differentiate(is_cut):
        specs = {"in_specs": (PartitionSpec("data"), PartitionSpec()), "out_specs": PartitionSpec("data")}
        function = jax.shard_map(lambda x, w: compute(x, w, is_cut), mesh=mesh, **specs)
        values, pull = jax.vjp(jax.jit(function), draw((4, 6, 2)), draw((2,)))
        return [values, *pull(jnp.sin(jnp.arange(values.size, dtype=values.dtype)))]

    compare(differentiate(False), differentiate(True), "shard_map")


@pytest.mark.parametrize("module", [rules, pieces])
def test_examples_of_the_docstrings_run(module):
    with jax.enable_x64(False):
        results = doctest.testmod(module)
    assert results.attempted > 0
    assert results.failed == 0
