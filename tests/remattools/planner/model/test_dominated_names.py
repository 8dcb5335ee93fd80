# SPDX-License-Identifier: Apache-2.0
"""Leaving dominated names out makes the integer programs smaller and their optima no worse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from remattools.planner.model.block_ilp import BlockProblem
from remattools.planner.model.dataflow_graph import Graph, build_block_graph
from remattools.planner.model.dominated_names import find_undominated_names
from remattools.planner.model.op_work import Step, Work
from remattools.planner.model.time import get_rates

ELEMENTWISE, FREE = Work("elementwise", 1.0), Work("free", 0.0)


def _make_graph(*steps: tuple[tuple[int, ...], int, Work], sizes: tuple[int, ...], residuals: set[int]) -> Graph:
    """Return a graph whose value 0 is its argument."""
    forward = tuple(Step(reads, (write,), work) for reads, write, work in steps)
    return Graph(
        forward=forward,
        backward=(),
        bytes=sizes,
        inputs=frozenset({0}),
        outputs=frozenset(),
        residuals=frozenset(residuals),
    )


def _find(graph: Graph) -> list[str]:
    costs = [step.work.flops for step in graph.forward]
    names = {f"v{value}": [value] for value in sorted(graph.producers)}
    return find_undominated_names(graph, range(len(graph.forward)), costs, names)


@pytest.mark.parametrize(
    ("sizes", "residuals", "expected"),
    [
        pytest.param((1, 4, 4, 4), {3}, ["v3"], id="chain of equal sizes"),
        pytest.param((1, 2, 4, 4), {3}, ["v1", "v3"], id="the start is smaller"),
        pytest.param((1, 4, 4, 4), {1, 3}, ["v1", "v3"], id="the start is read by the backward pass"),
    ],
)
def test_of_a_chain_only_the_last_value_is_needed(
    sizes: tuple[int, ...], residuals: set[int], expected: list[str]
) -> None:
    chain = [((number,), number + 1, ELEMENTWISE) for number in range(3)]
    assert _find(_make_graph(*chain, sizes=sizes, residuals=residuals)) == expected


def test_a_free_copy_is_not_needed_beside_its_source() -> None:
    steps = (((0,), 1, ELEMENTWISE), ((1,), 2, FREE), ((1,), 3, ELEMENTWISE))
    graph = _make_graph(*steps, sizes=(1, 4, 8, 8), residuals={2, 3})
    assert _find(graph) == ["v1", "v3"]
    costly = _make_graph(steps[0], ((1,), 2, ELEMENTWISE), steps[2], sizes=(1, 4, 8, 8), residuals={2, 3})
    assert _find(costly) == ["v1", "v2", "v3"]  # control


def _block(x: jax.Array, w: jax.Array, v: jax.Array) -> jax.Array:
    hidden = jax.nn.gelu(x @ w)
    scores = jax.nn.softmax(hidden @ hidden.T)
    return jnp.tanh(scores @ hidden @ v) * x


@pytest.mark.parametrize("target", ["cpu", "tpu:v5e:2x2"])
def test_the_cheapest_choices_stay_as_cheap(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    jaxpr = jax.make_jaxpr(_block)(jnp.ones((64, 32)), jnp.ones((32, 128)), jnp.ones((128, 32)))

    def solve() -> tuple[int, list[float]]:
        problem = BlockProblem(build_block_graph(jaxpr), get_rates(target))
        total = sum(problem.bytes.values())
        limited = [problem.find_cheapest(0.0, share * total).total_cycles for share in (0.05, 0.2, 0.4, 0.7)]
        priced = [(price, problem.find_cheapest(price)) for price in (1.0, 0.1, 0.01)]
        return len(problem._undominated_names), [
            *limited,
            *(choice.total_cycles + price * choice.saved_bytes for price, choice in priced),
        ]

    few, reduced = solve()
    monkeypatch.setattr(
        "remattools.planner.model.block_ilp.find_undominated_names", lambda graph, steps, costs, names: list(names)
    )
    many, whole = solve()
    assert few < many  # control: something was left out
    np.testing.assert_allclose(reduced, whole, rtol=2e-4)  # the solver's own tolerance is 1e-4
