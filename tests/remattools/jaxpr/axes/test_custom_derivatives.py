# SPDX-License-Identifier: Apache-2.0
"""Pieces of functions with derivatives of their own have pieces of these derivatives."""

import jax
import jax.numpy as jnp
import pytest

from remattools.jaxpr.axes.factor import Piece
from remattools.jaxpr.axes.pieces import run_piece
from remattools.jaxpr.axes.rules import find_factors

from .cutting import check, compare, draw, find_equation, run_in_pieces
from .drawing import normalize


@jax.custom_vjp
def cross_entropy(logits, labels, scale):
    """Return a loss for each token, with integers and a whole scalar among the operands."""
    return scale * (jax.nn.logsumexp(logits, -1) - jnp.take_along_axis(logits, labels[..., None], -1)[..., 0])


def _cross_entropy_forward(logits, labels, scale):
    return cross_entropy(logits, labels, scale), (logits, labels, scale)


def _cross_entropy_backward(residuals, g):
    logits, labels, scale = residuals
    one_hot = jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype)
    # A gradient that no other rule would give, so that it is seen which rule was used.
    return 3 * scale * g[..., None] * (jax.nn.softmax(logits) - one_hot), None, jnp.sum(g)


cross_entropy.defvjp(_cross_entropy_forward, _cross_entropy_backward)


@jax.custom_jvp
def quantize(x, bits):
    """Round, and let the gradient pass, twice."""
    return jnp.round(x * bits) / bits


@quantize.defjvp
def _push_quantize(primals, tangents):
    return quantize(*primals), 2 * tangents[0]


@jax.custom_vjp
def project(x, w):
    """Multiply by a matrix whose gradient is transposed after it was summed."""
    return x @ w.T


project.defvjp(lambda x, w: (x @ w.T, (x, w)), lambda r, g: (g @ r[1], (r[0].T @ g).T))


def test_integers_scalars_and_the_given_gradient():
    labels = jnp.arange(24).reshape(4, 6) % 5
    check(
        cross_entropy,
        draw((4, 6, 5)),
        labels,
        jnp.float64(2),
        name="custom_vjp_call",
        expected=["0 0 . -> 0", "1 1 . -> 1"],
    )


def test_weights_get_the_sum_of_the_pieces():
    check(normalize, draw((4, 6)), draw((6,)), name="custom_vjp_call", expected=["0 . -> 0"])
    check(project, draw((4, 6)), draw((3, 6)), name="custom_vjp_call", expected=["0 . -> 0", ". 0 -> 1"])


def test_a_tangent_rule_with_an_integer_operand():
    check(quantize, draw((4, 6)), jnp.int32(8), name="custom_jvp_call", expected=["0 . -> 0", "1 . -> 1"])


@pytest.mark.parametrize("function", [jax.nn.relu, jax.nn.relu6])
def test_gradients_of_gradients_ask_the_rule_of_the_rule(function):
    equation, (x,) = find_equation(function, draw((4, 6)), name="custom_jvp_call")
    factor = find_factors(equation)[0]

    def differentiate_twice(function):
        return jax.grad(lambda x: jnp.sum(jax.grad(lambda x: jnp.sum(function(x) ** 3))(x) ** 2))(x)

    pieces = differentiate_twice(lambda x: run_in_pieces(equation, factor, [x], 3)[0])
    compare([differentiate_twice(function)], [pieces], str(function))


def test_rules_run_after_the_trace_that_made_the_piece():
    """A gradient of a scan traces its body, and asks for the rules when the body has ended."""
    equation, operands = find_equation(normalize, draw((6, 4)), draw((4,)), name="custom_vjp_call")
    (factor,) = find_factors(equation)

    def pieces(x, w):
        def body(carry, pair):
            index, rows = pair
            return carry, run_piece(equation, factor, [rows, w], Piece(index, 2, 6))[0]

        return jax.lax.scan(jax.checkpoint(body), 0, (jnp.arange(3), x.reshape(3, 2, 4)))[1].reshape(6, 4)

    expected = jax.grad(lambda *args: (normalize(*args) ** 2).sum(), (0, 1))(*operands)
    compare(expected, jax.jit(jax.grad(lambda *args: (pieces(*args) ** 2).sum(), (0, 1)))(*operands), "scan")
