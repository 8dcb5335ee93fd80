# SPDX-License-Identifier: Apache-2.0
"""Each factor of each equation of random programs is right, and each of JAX's primitives has a rule or a reason."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import primitives

from remattools.jaxpr.axes.custom_cuts import PRIMITIVES
from remattools.jaxpr.axes.factor import Factor
from remattools.jaxpr.axes.rules import RULES, find_factors

from .cutting import check_equation, choose_cut, draw, find_equation, run_equations
from .drawing import draw_program

WITHOUT_RULE = {
    "after_all": "orders effects",
    "all_gather": "a collective",
    "all_to_all": "a collective",
    "axis_index": "a scalar",
    "cond": "branches; a border of what is cut",
    "create_token": "orders effects",
    "custom_lin": "the derivative of a custom_vjp, which only exists while a gradient is traced",
    "custom_linear_solve": "a solver given as functions, which may look at all rows at once",
    "device_put": "moves a whole value between devices or kinds of memory",
    "empty2": "internal to scans",
    "eval_jaxpr": "internal to JAX",
    "get": "reads a reference",
    "jit": "whoever cuts a program inlines it first",
    "pmax": "a collective",
    "pmin": "a collective",
    "ppermute": "a collective",
    "psum": "a collective",
    "ragged_all_to_all": "a collective",
    "random_gamma": "draws until it accepts, with keys split over all elements",
    "remat2": "a region; a border of what is cut",
    "rng_bit_generator": "bits depend on everything drawn with them",
    "rng_uniform": "values depend on everything drawn with them",
    "scan": "a loop; a border of what is cut",
    "select_and_scatter": "windows given as programs; JAX's gradients use select_and_scatter_add",
    "swap": "writes a reference",
    "while": "a loop; a border of what is cut",
}


def test_each_primitive_has_a_rule_or_a_reason_not_to():
    names = {value.name for value in vars(primitives).values() if hasattr(value, "bind")}
    assert len(names) > 150, "control: primitives are found"
    assert sorted(names - RULES.keys() - PRIMITIVES) == sorted(WITHOUT_RULE)


def _describe_equation(equation):
    avals = [str(atom.aval) for atom in (*equation.invars, *equation.outvars)]
    return str((equation.primitive, equation.params, avals))


def _check_program(seed):
    """Check the equations of a random program, those of a kind once, and return the number of factors."""
    function, inputs = draw_program(seed)
    program = jax.make_jaxpr(function)(*inputs)
    rng = np.random.default_rng(seed)
    kinds = {_describe_equation(found[0]): found for found in run_equations(program, inputs)}
    return sum(check_equation(*pair, choose=choose_cut(rng)) for pair in kinds.values())


@pytest.mark.parametrize("seed", range(20))
def test_pieces_of_random_programs_are_the_whole(seed):
    assert _check_program(seed) > 0


@pytest.mark.long
@pytest.mark.parametrize("seed", range(20, 100))
def test_pieces_of_many_random_programs_are_the_whole(seed):
    _check_program(seed)


def _swap_axes(factor):
    return dataclasses.replace(factor, results=tuple(1 - axis for axis in factor.results))


@pytest.mark.parametrize(
    ("name", "function", "find"),
    [
        pytest.param("transpose", jnp.transpose, _swap_axes, id="axes-swapped"),
        pytest.param("exp", jnp.exp, _swap_axes, id="another-axis"),
        pytest.param("reduce_max", lambda x: x.max(0), lambda _: Factor((0,), (None,), "sum"), id="max-for-sum"),
        pytest.param("cumsum", lambda x: jax.lax.cumsum(x, 0), lambda _: Factor((0,), (0,)), id="axis-in-order"),
        pytest.param("reshape", lambda x: x.reshape(16), lambda _: Factor((1,), (0,)), id="minor-axis-of-a-reshape"),
    ],
)
def test_a_wrong_rule_is_found(monkeypatch, name, function, find):
    """Control."""
    equation, operands = find_equation(function, draw((4, 4)), name=name)
    check_equation(equation, operands)
    rule = RULES[name]
    wrong = dataclasses.replace(rule, find=lambda equation: map(find, rule.find(equation)))
    monkeypatch.setitem(RULES, name, wrong)
    with pytest.raises(AssertionError):
        check_equation(equation, operands)


def test_unknown_primitives_and_effects_have_no_factors():
    x = draw((4, 6))
    program = jax.make_jaxpr(lambda x: jax.lax.fori_loop(0, 3, lambda _, y: jnp.sin(y), x))(x)
    assert [find_factors(equation) for equation in program.eqns] == [()]

    def print_and_add(x):
        jax.debug.print("{}", x)
        return x + 1

    program = jax.make_jaxpr(print_and_add)(x)
    assert [len(find_factors(equation)) for equation in program.eqns] == [0, 2]
