# SPDX-License-Identifier: Apache-2.0
"""The schedule has each block once with its backward pass, and loops once with their iterations."""

from typing import Any

import jax
import jax.numpy as jnp

from remattools.planner.model.block_primitive import BlockTracer
from remattools.planner.model.schedule import BLOCK_LABEL, build_schedule

X = jnp.ones((2, 3))


def scheduled(make: Any) -> Any:
    """The schedule of the gradient of a function that gets a block to call."""
    tracer = BlockTracer()

    def block(x: jax.Array) -> jax.Array:
        return tracer(jnp.sin, x, ("block",))

    return build_schedule(jax.make_jaxpr(jax.grad(lambda x: jnp.sum(make(block, x))))(X))


def test_backward_passes_run_in_reverse_order() -> None:
    graph, visits = scheduled(lambda block, x: block(block(x)))
    first, second = visits
    assert first.forward < second.forward < second.backward < first.backward
    assert [graph.forward[n].tag for n in (first.forward, first.backward)] == [("forward", 0), ("backward", 0)]


def test_a_scan_saves_one_copy_for_each_iteration() -> None:
    graph, (visit,) = scheduled(lambda block, x: jax.lax.scan(lambda c, _: (block(c), None), x, length=5)[0])
    assert (visit.copies, visit.iterations) == (5, 5)
    assert visit.first < visit.forward < visit.backward < visit.last
    assert graph.forward[visit.forward].iterations == 5


def test_a_block_inside_the_users_remat_saves_nothing() -> None:
    _, (visit,) = scheduled(lambda block, x: jax.checkpoint(block)(x))
    assert visit.copies == 0


def test_a_block_without_a_backward_pass_is_a_step_only() -> None:
    graph, visits = scheduled(lambda block, x: x * jax.lax.stop_gradient(block(x)))
    assert visits == ()
    assert any(step.label == BLOCK_LABEL for step in graph.forward)
