# SPDX-License-Identifier: Apache-2.0
"""Functions with derivatives of their own have factors if all of their rules have."""

import jax
import jax.numpy as jnp
import pytest

from remattools.jaxpr.axes.custom_cuts import find_custom_cuts
from remattools.jaxpr.axes.rules import find_factors

from .cutting import describe, draw, find_equation
from .drawing import normalize


def _make_custom_vjp(backward, forward=None):
    @jax.custom_vjp
    def multiply(x, w):
        return x * w

    multiply.defvjp(forward or (lambda x, w: (x * w, (x, w))), backward)
    return multiply


def _find(function, *arguments, name="custom_vjp_call"):
    equation, _ = find_equation(function, *arguments, name=name)
    return [describe(factor) for factor in find_custom_cuts(equation, find_factors)]


def test_rows_are_cut_and_weights_are_summed():
    assert _find(normalize, draw((2, 4, 6)), draw((6,))) == ["0 . -> 0", "1 . -> 1"]


@pytest.mark.parametrize(
    ("backward", "expected"),
    [
        pytest.param(lambda r, g: (g * r[1], (g * r[0]).sum(0)), ["0 . -> 0", "1 0 -> 1"], id="control-sum"),
        pytest.param(lambda r, g: (g * r[1], None), ["0 . -> 0", "1 0 -> 1"], id="control-no-gradient"),
        pytest.param(lambda r, g: (g * r[1], jnp.zeros(6)), ["0 . -> 0", "1 0 -> 1"], id="control-zeros"),
        pytest.param(lambda r, g: (g * r[1], jnp.ones(6)), ["1 0 -> 1"], id="constant-for-weights"),
        pytest.param(lambda r, g: (g * r[1], (g * r[0]).max(0)), ["1 0 -> 1"], id="max-over-rows"),
        pytest.param(lambda r, g: (g * r[1], jnp.sin((g * r[0]).sum(0))), ["1 0 -> 1"], id="function-of-a-sum"),
        pytest.param(lambda r, g: (g * r[1] / g.sum(0), (g * r[0]).sum(0)), ["1 0 -> 1"], id="rows-that-mix"),
        pytest.param(
            lambda r, g: (g.sum(1, keepdims=True) * r[1], (g * r[0]).sum(0)), ["0 . -> 0"], id="columns-that-mix"
        ),
    ],
)
def test_the_backward_rule_decides(backward, expected):
    assert _find(_make_custom_vjp(backward), draw((4, 6)), draw((6,))) == expected


@pytest.mark.parametrize(
    ("forward", "expected"),
    [
        pytest.param(lambda x, w: (x * w, (x, w)), ["0 . -> 0", "1 0 -> 1"], id="control"),
        pytest.param(lambda x, w: (x * w, (x, w / x.sum())), [], id="residual-of-all-rows"),
        pytest.param(lambda x, w: (x * w, (x, w * x.sum(0))), ["1 0 -> 1"], id="residual-of-a-sum"),
    ],
)
def test_the_forward_rule_decides(forward, expected):
    function = _make_custom_vjp(lambda r, g: (g * r[1], (g * r[0]).sum(0)), forward)
    assert _find(function, draw((4, 6)), draw((6,))) == expected


def _fail(*_):
    raise RuntimeError("differentiated")


def test_rules_that_fail_have_no_factors():
    assert _find(_make_custom_vjp(lambda r, g: _fail()), draw((4, 6)), draw((6,))) == []
    assert _find(_make_custom_vjp(lambda r, g: (g, g), _fail), draw((4, 6)), draw((6,))) == []


@pytest.mark.parametrize(
    ("symbolic_zeros", "expected"),
    [pytest.param(True, [], id="symbolic"), pytest.param(False, ["0 -> 0"], id="control")],
)
def test_rules_that_look_at_symbolic_zeros_have_no_factors(symbolic_zeros, expected):
    function = jax.custom_jvp(lambda x: 2 * x)
    function.defjvp(lambda primals, tangents: (2 * primals[0], 2 * tangents[0]), symbolic_zeros=symbolic_zeros)
    assert _find(function, draw((4,)), name="custom_jvp_call") == expected


def test_constants_of_a_closure_have_no_factors():
    def function(x, w):
        inner = jax.custom_jvp(lambda x: x * w)
        inner.defjvp(lambda primals, tangents: (inner(*primals), tangents[0] * w))
        return inner(x)

    equation, _ = find_equation(function, draw((4,)), draw((4,)), name="custom_jvp_call")
    assert equation.params["num_consts"] == 1
    assert find_factors(equation) == ()


@pytest.mark.parametrize("function", [jax.nn.relu, jax.nn.relu6, lambda x: jnp.logaddexp(x, x)])
def test_rules_that_call_their_own_function(function):
    assert "0" in _find(function, draw((4, 6)), name="custom_jvp_call")[0]


def test_a_tangent_rule_that_mixes_rows_has_no_factor():
    function = jax.custom_jvp(lambda x: 2 * x)
    function.defjvp(lambda primals, tangents: (2 * primals[0], tangents[0] - tangents[0].mean(0)))
    assert _find(function, draw((4, 6)), name="custom_jvp_call") == ["1 -> 1"]
