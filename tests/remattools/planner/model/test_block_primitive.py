# SPDX-License-Identifier: Apache-2.0
"""A block is one equation, under every transform that the planner follows."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import remattools as rt
from remattools.jaxpr import jaxprs
from remattools.planner.model.block_primitive import BLOCK_PRIMITIVE, BlockTracer


def trace_blocks(transform: Any, calls: int = 1) -> list[Any]:
    """The equations of blocks in a transformed function of `calls` equal blocks."""
    tracer = BlockTracer()

    def run(inputs: Any) -> Any:
        return {"out": jnp.sin(inputs["x"])}

    def fn(x: jax.Array) -> jax.Array:
        for number in range(calls):
            x = tracer(run, {"x": x}, ("layers", number))["out"]
        return x.sum()

    return list(find_block_equations(jax.make_jaxpr(transform(fn))(jnp.ones((2, 3)))))


def find_block_equations(jaxpr: Any) -> Iterator[Any]:
    for equation in jaxprs.open_jaxpr(jaxpr).eqns:
        if equation.primitive is BLOCK_PRIMITIVE:
            yield equation
        for _, inside in jaxprs.find_subjaxprs(equation):
            yield from find_block_equations(inside)


def test_a_gradient_has_one_equation_for_each_pass() -> None:
    forward, backward = trace_blocks(jax.grad)
    assert (forward.params["is_backward"], backward.params["is_backward"]) == (False, True)
    assert forward.params["block"].number == backward.params["block"].number


def test_a_batched_block_is_one_equation_of_the_batch() -> None:
    (equation,) = trace_blocks(jax.vmap)
    assert equation.params["block"].jaxpr.outvars[0].aval.shape == (2, 3)


def test_equal_blocks_share_their_jaxpr() -> None:
    first, second = (equation.params["block"] for equation in trace_blocks(lambda fn: fn, calls=2))
    assert first.jaxpr is second.jaxpr
    assert (first.path, second.path) == (("layers", 0), ("layers", 1))
    assert first.number != second.number


def test_forward_mode_is_refused() -> None:
    with pytest.raises(rt.MeasureError, match="forward mode"):
        trace_blocks(lambda fn: lambda x: jax.jvp(jax.grad(fn), (x,), (x,)))
