# SPDX-License-Identifier: Apache-2.0
"""Graphs have both passes, nameable values, and know what compilers fuse."""

from typing import Any

import jax
import jax.numpy as jnp

from remattools.planner.model.dataflow_graph import Graph, build_block_graph

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
