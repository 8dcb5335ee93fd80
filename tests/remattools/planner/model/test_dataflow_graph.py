# SPDX-License-Identifier: Apache-2.0
"""Graphs have both passes, nameable values, and know what compilers fuse."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.ad_checkpoint import checkpoint_name

from remattools.planner.model.block_ilp import WORK_KINDS, BlockProblem
from remattools.planner.model.dataflow_graph import Graph, build_block_graph
from remattools.planner.model.time import get_rates

ROWS, WIDTH = 64, 32
VALUE = ROWS * WIDTH * 4


def graph_of(fn: Any, gradient_mask: tuple[bool, ...] | None = None) -> Graph:
    shapes = (ROWS, WIDTH), (WIDTH, WIDTH), (WIDTH, WIDTH)
    jaxpr = jax.make_jaxpr(fn)(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes))
    return build_block_graph(jaxpr, gradient_mask)


def block(x: jax.Array, up: jax.Array, down: jax.Array) -> jax.Array:
    return jnp.sin(x @ up) @ down


def count_products(graph: Graph) -> int:
    return sum(step.work.kind == "matrix" for step in graph.backward)


def test_a_block_has_candidates_and_both_passes() -> None:
    graph = graph_of(block)
    assert [candidate.name for candidate in graph.candidates] == [".:dot_general[0]", ".:sin[0]", ".:dot_general[1]"]
    assert sum(step.work.kind == "matrix" for step in graph.forward) == 2
    assert count_products(graph) == 4  # one for each gradient of each product


def test_a_masked_gradient_is_not_computed() -> None:
    assert count_products(graph_of(block, (False, True, True))) == 3


def test_element_wise_operations_are_fused_into_element_wise_readers() -> None:
    graph = graph_of(lambda x, up, down: jnp.exp(jnp.sin(x @ up)) @ down)
    values = {candidate.name: candidate.value for candidate in graph.candidates}
    assert graph.find_fused_values(graph.forward) >= {values[".:sin[0]"]}
    assert values[".:exp[0]"] not in graph.find_fused_values(graph.forward)  # a product reads it
    assert values[".:sin[0]"] not in graph.find_fused_values(graph.forward, [values[".:sin[0]"]])


def test_fused_products_halve_what_only_products_read() -> None:
    plain = graph_of(block)
    halved = plain.fuse_products()
    sizes = {candidate.name: candidate.bytes for candidate in halved.candidates}
    assert {candidate.bytes for candidate in plain.candidates} == {VALUE}
    assert sizes[".:sin[0]"] == VALUE // 2
    assert sizes[".:dot_general[0]"] == VALUE  # element-wise operations read it as well


def _make_kernel_block(*, in_jit: bool, named: bool) -> Any:
    """Return a block around a custom_vjp whose forward rule computes two products, the second its result."""

    def compute(x: jax.Array, up: jax.Array, down: jax.Array) -> tuple[jax.Array, jax.Array]:
        hidden = x @ up
        out = hidden @ down
        return (checkpoint_name(out, "context") if named else out), hidden.sum(-1)

    run = jax.jit(compute) if in_jit else compute

    @jax.custom_vjp
    def kernel(x: jax.Array, up: jax.Array, down: jax.Array) -> jax.Array:
        return compute(x, up, down)[0]

    def forward(x: jax.Array, up: jax.Array, down: jax.Array) -> Any:
        out, total = run(x, up, down)
        return out, (out, total, up, down)

    def backward(saved: Any, g: jax.Array) -> Any:
        out, total, up, down = saved
        return g * out * total[:, None], up * g.sum(), down * g.sum()

    kernel.defvjp(forward, backward)
    return lambda x, up, down: jnp.sin(kernel(x, up, down)) @ down


@pytest.mark.parametrize("in_jit", [False, True])
@pytest.mark.parametrize(("named", "result"), [(True, "@context[0]"), (False, ".:custom_vjp_call[0]")])
def test_a_custom_vjp_is_priced_by_its_forward_rule(in_jit: bool, named: bool, result: str) -> None:
    problem = BlockProblem(graph_of(_make_kernel_block(in_jit=in_jit, named=named)), get_rates("cpu"))
    nothing, one, both = (
        problem.make_choice(names).cycles[WORK_KINDS.index("matrix")]
        for names in ((), (result,), (result, ".:reduce_sum[0]"))
    )
    # The result alone spares its own product; the other residual needs the first one again.
    assert nothing > one > both == 0
    assert (".:custom_vjp_call[0]" in problem.names) is not named
