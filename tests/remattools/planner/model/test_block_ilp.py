# SPDX-License-Identifier: Apache-2.0
"""What a block saves: the best of all subsets, with chains of values priced as a whole."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from remattools.planner.model.block_ilp import BlockProblem
from remattools.planner.model.dataflow_graph import build_block_graph
from remattools.planner.model.memory import compute_live_bytes
from remattools.planner.model.time import get_rates


def _problem(
    fn: Any, *shapes: tuple[int, ...], target: str = "tpu:v5e:2x2", wanted: tuple[bool, ...] | None = None
) -> BlockProblem:
    program = jax.make_jaxpr(fn)(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes))
    return BlockProblem(build_block_graph(program, wanted), get_rates(target))


def _chain(x: jax.Array, w: jax.Array) -> jax.Array:
    a = jnp.tanh(x @ w)
    b = jnp.exp(a @ w)
    c = jnp.cos(b @ w)
    return jnp.sin(c.sum(axis=-1, keepdims=True) * c)


def _best_by_trying(problem: BlockProblem, limit: float) -> float:
    names = list(problem.names)
    subsets = itertools.chain.from_iterable(itertools.combinations(names, n) for n in range(len(names) + 1))
    choices = (problem.make_choice(subset) for subset in subsets)
    return min(choice.total_cycles for choice in choices if choice.saved_bytes <= limit)


@pytest.mark.parametrize("share", [0.0, 0.2, 0.4, 0.6, 0.8, 1.0])
def test_the_choice_is_the_best_of_all_subsets(share: float) -> None:
    problem = _problem(_chain, (64, 256), (256, 256))
    assert 4 <= len(problem.names) <= 12  # else trying everything proves nothing, or does not end
    limit = share * sum(problem.bytes.values())
    found = problem.find_cheapest(0.0, limit)
    assert found.saved_bytes <= limit
    assert found.total_cycles <= 1.001 * _best_by_trying(problem, limit)


def test_a_chain_is_priced_as_a_chain() -> None:
    """Saving only the end of a chain avoids recomputing the whole chain, which a price per value would miss."""

    def chain(x: jax.Array, w: jax.Array, y: jax.Array) -> jax.Array:
        for _ in range(4):
            x = jax.lax.stop_gradient(x) @ jax.lax.stop_gradient(w)
        return jnp.sin(x) * y

    problem = _problem(chain, (64, 256), (256, 256), (64, 256))
    nothing, one = problem.make_choice(()), problem.find_cheapest(0.0, 64 * 256 * 4)
    assert nothing.cycles[0] > 0
    assert one.names is not None
    assert len(one.names) == 1
    assert one.cycles[0] == 0  # no matrix product again


def test_saving_more_never_costs_more_cycles() -> None:
    problem = _problem(_chain, (64, 256), (256, 256))
    totals = [
        problem.find_cheapest(0.0, limit).total_cycles for limit in np.linspace(0, sum(problem.bytes.values()), 8)
    ]
    assert all(later <= earlier * 1.001 for earlier, later in itertools.pairwise(totals))
    assert totals[-1] < totals[0]  # control: saving helps at all


def test_a_block_that_needs_nothing_back_saves_nothing() -> None:
    problem = _problem(lambda x: x + 1.0, (8, 8))
    assert problem.find_cheapest(0.0).names == ()
    assert problem.make_choice(()).total_cycles == 0


ROWS, WIDTH = 256, 64
VALUE = ROWS * 2 * WIDTH * 4  # bytes
SHAPES = (ROWS, WIDTH), (WIDTH, 2 * WIDTH), (2 * WIDTH, 2 * WIDTH), (2 * WIDTH, WIDTH)


def _residual(x: jax.Array, up: jax.Array, across: jax.Array, down: jax.Array) -> jax.Array:
    return x + jnp.cos(jnp.sin(x @ up) @ across) @ down


def test_what_products_alone_read_takes_half_on_a_tpu() -> None:
    """The TPU's compiler stores bfloat16 for the matrix units and float32 for everything else."""
    halved, full = _problem(_residual, *SHAPES), _problem(_residual, *SHAPES, target="cpu")
    assert halved.bytes[".:sin[0]"] == halved.bytes[".:cos[0]"] == VALUE // 2
    assert halved.bytes[".:dot_general[0]"] == VALUE
    assert set(full.bytes.values()) == {VALUE}

    def exact(*arrays: jax.Array) -> jax.Array:
        with jax.default_matmul_precision("highest"):
            return _residual(*arrays)

    assert _problem(exact, *SHAPES).bytes[".:sin[0]"] == VALUE


def test_without_a_region_a_tpu_saves_what_crosses_passes() -> None:
    """Two products and their activations; the derivatives (cos, sin) are fused into what reads them."""
    assert _problem(_residual, *SHAPES).plain_choice.saved_bytes == 2 * VALUE + 2 * VALUE // 2


def test_values_are_recomputed_where_they_are_needed() -> None:
    problem = _problem(_residual, *SHAPES)
    graph = problem.graph
    saved = set(problem.names[".:dot_general[1]"])
    early = [*(step for step in graph.forward if not saved.intersection(step.writes)), *graph.backward]
    assert problem.make_choice((".:dot_general[1]",)).backward_bytes < max(
        compute_live_bytes(graph, early, live_at_start=saved)
    )


def test_what_runs_inside_of_its_reader_reads_when_that_does() -> None:
    """The backward pass reads `cos` of a product, which is fused: the product itself has to stay live."""
    graph = _problem(_residual, *SHAPES, target="cpu").graph
    waiting = compute_live_bytes(graph, (*graph.forward, *graph.backward))[len(graph.forward)]
    assert waiting >= 4 * VALUE  # two products, and two values that other products read


def test_names_that_nobody_reads_are_left_out() -> None:
    """The derivative of `exp` reads its result, so that nothing is left for the product before it."""
    problem = _problem(lambda x, w, v: jnp.exp(x @ w) @ v, (ROWS, WIDTH), (WIDTH, WIDTH), (WIDTH, WIDTH))
    both, one = problem.make_choice((".:dot_general[0]", ".:exp[0]")), problem.make_choice((".:exp[0]",))
    assert both == one
    assert one.names == (".:exp[0]",)
    assert problem.make_choice((".:dot_general[0]",)).names == (".:dot_general[0]",)


def test_an_unread_gradient_is_not_computed() -> None:
    products = [
        sum(step.work.kind == "matrix" for step in _problem(_residual, *SHAPES, wanted=wanted).graph.backward)
        for wanted in ((True, True, True, True), (False, True, True, True))
    ]
    assert products == [6, 5]
