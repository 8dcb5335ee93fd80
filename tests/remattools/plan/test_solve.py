# SPDX-License-Identifier: Apache-2.0
"""What a block keeps: exact against trying everything, priced through chains."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from remattools.plan.cost import rates_of
from remattools.plan.graph import block_graph
from remattools.plan.solve import BlockProblem


def _problem(fn: Any, *shapes: tuple[int, ...]) -> BlockProblem:
    program = jax.make_jaxpr(fn)(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes))
    return BlockProblem(block_graph(program), rates_of("tpu:v5e:2x2"))


def _chain(x: jax.Array, w: jax.Array) -> jax.Array:
    a = jnp.tanh(x @ w)
    b = jnp.exp(a @ w)
    c = jnp.cos(b @ w)
    return jnp.sin(c.sum(axis=-1, keepdims=True) * c)


def _best_by_trying(problem: BlockProblem, limit: float) -> float:
    names = list(problem.names)
    subsets = itertools.chain.from_iterable(itertools.combinations(names, n) for n in range(len(names) + 1))
    choices = (problem.choice(subset) for subset in subsets)
    return min(choice.total_cycles for choice in choices if choice.kept_bytes <= limit)


@pytest.mark.parametrize("share", [0.0, 0.2, 0.4, 0.6, 0.8, 1.0])
def test_the_choice_is_the_best_of_all_subsets(share: float) -> None:
    problem = _problem(_chain, (64, 256), (256, 256))
    assert 4 <= len(problem.names) <= 12  # else trying everything proves nothing, or does not end
    limit = share * sum(problem.bytes.values())
    found = problem.cheapest(0.0, limit)
    assert found.kept_bytes <= limit
    assert found.total_cycles <= 1.001 * _best_by_trying(problem, limit)


def test_a_chain_is_priced_as_a_chain() -> None:
    """Keeping the end of a chain alone saves the whole chain: an item-wise price would not see that."""

    def chain(x: jax.Array, w: jax.Array, y: jax.Array) -> jax.Array:
        for _ in range(4):
            x = jax.lax.stop_gradient(x) @ jax.lax.stop_gradient(w)
        return jnp.sin(x) * y

    problem = _problem(chain, (64, 256), (256, 256), (64, 256))
    nothing, one = problem.choice(()), problem.cheapest(0.0, 64 * 256 * 4)
    assert nothing.cycles[0] > 0
    assert one.names is not None
    assert len(one.names) == 1
    assert one.cycles[0] == 0  # no matrix product again


def test_keeping_more_never_costs_more() -> None:
    problem = _problem(_chain, (64, 256), (256, 256))
    totals = [problem.cheapest(0.0, limit).total_cycles for limit in np.linspace(0, sum(problem.bytes.values()), 8)]
    assert all(later <= earlier * 1.001 for earlier, later in itertools.pairwise(totals))
    assert totals[-1] < totals[0]  # control: keeping helps at all


def test_a_block_that_needs_nothing_back_keeps_nothing() -> None:
    problem = _problem(lambda x: x + 1.0, (8, 8))
    assert problem.cheapest(0.0).names == ()
    assert problem.choice(()).total_cycles == 0
