# SPDX-License-Identifier: Apache-2.0
"""What XLA's CPU compiler copies, fuses, stores and runs first; and that predictions need all of it."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import remattools as rt
from remattools.analysis.compare import use_rules
from remattools.planner.model.cpu_kernels import arrange_kernels
from remattools.planner.model.dataflow_graph import Graph, build_block_graph
from remattools.planner.model.memory import compute_live_bytes, find_materialized_residuals
from remattools.planner.model.op_work import Access, Step, Work
from remattools.planner.model.outline import build_outline
from remattools.planner.model.time import get_rates
from remattools.planner.search.space import Space
from remattools.planner.search.to_rules import write_rules

ROWS, TOKENS, WIDTH = 4, 16, 32
VALUE = ROWS * TOKENS * WIDTH * 4
ELEMENTWISE, COSTLY = Work("elementwise", 1.0), Work("elementwise", 1.0, is_costly=True)


def graph_of(fn: Any, shape: tuple[int, ...] = (ROWS, TOKENS, WIDTH)) -> Graph:
    jaxpr = jax.make_jaxpr(fn)(*(jax.ShapeDtypeStruct(s, jnp.float32) for s in (shape, (WIDTH, WIDTH), (WIDTH,))))
    return build_block_graph(jaxpr).use_cpu_kernels()


def find_label(graph: Graph, label: str) -> int:
    return next(step.writes[0] for step in graph.forward if step.label == label)


def count_copies(graph: Graph) -> int:
    return sum(step.label == "copy of an operand" for step in (*graph.forward, *graph.backward))


@pytest.mark.parametrize(
    ("shape", "copies"),
    [pytest.param((ROWS, TOKENS, WIDTH), 1, id="three-axes"), pytest.param((TOKENS, WIDTH), 0, id="matrix")],
)
def test_the_gradient_of_weights_copies_a_cotangent_of_three_axes(shape: tuple[int, ...], copies: int) -> None:
    assert count_copies(graph_of(lambda x, w, _: x @ w, shape)) == copies


def test_attention_copies_heads_that_lie_inside() -> None:
    def attend(x: jax.Array, w: jax.Array, _: jax.Array) -> jax.Array:
        heads = (x @ w).reshape(ROWS, TOKENS, 2, WIDTH // 2)
        return jnp.einsum("bqhd,bkhd->bhqk", heads, heads + 1)

    graph = graph_of(attend)
    assert sum(step.label == "copy of an operand" for step in graph.forward) == 2


@pytest.mark.parametrize(
    ("fn", "stored"),
    [
        pytest.param(jnp.tanh, True, id="costly"),
        pytest.param(jnp.abs, False, id="cheap"),
        pytest.param(jnp.cos, False, id="fused-by-XLA"),
    ],
)
def test_a_costly_value_with_two_readers_is_stored(fn: Any, stored: bool) -> None:
    def run(x: jax.Array, w: jax.Array, _: jax.Array) -> tuple[jax.Array, jax.Array]:
        value = fn(x @ w)
        return (value + 1) @ w, (value * 2) @ w

    graph = graph_of(run)
    label = {jnp.tanh: "tanh", jnp.abs: "abs", jnp.cos: "cos"}[fn]
    assert (find_label(graph, label) not in graph.find_fused_values(graph.forward)) is stored


def test_a_plain_block_stores_what_both_passes_read() -> None:
    def run(x: jax.Array, w: jax.Array, _: jax.Array) -> jax.Array:
        gate, up = x @ w, x @ w.T
        return ((gate * up) * jnp.abs(up)) @ w

    graph = graph_of(run)
    product = find_label(graph, "mul")
    assert product in find_materialized_residuals(graph)
    # Control: recomputed, it depends on nothing that its readers wait for.
    assert product in graph.find_fused_values((*graph.forward, *graph.backward))


def test_a_reduction_stores_its_broadcast_operand() -> None:
    graph = graph_of(lambda x, _, scale: (x * scale).sum(-1))
    read = {value for step in graph.forward if step.label == "mul" for value in step.reads}
    wide = next(iter(read.difference(graph.inputs)))
    assert graph.bytes[wide] == VALUE
    assert wide not in graph.find_fused_values(graph.forward)
    other = graph_of(lambda x, w, scale: jnp.abs(x * scale))  # control: no reduction
    assert other.find_fused_values(other.forward) >= {find_label(other, "broadcast_in_dim")}


def test_kernels_run_as_soon_as_their_operands_are_there() -> None:
    chain = [Step((0,), (1,), ELEMENTWISE), Step((1,), (2,), ELEMENTWISE), Step((0,), (3,), ELEMENTWISE)]
    accesses = [Access(frozenset(step.reads), step.writes) for step in chain]
    assert [kernel.writes for kernel in arrange_kernels(chain, accesses)] == [(1,), (3,), (2,)]


@pytest.mark.parametrize(("is_read_later", "live"), [(False, 8), (True, 16)], ids=["dead", "read-later"])
def test_a_result_is_written_over_an_operand_that_is_dead(is_read_later: bool, live: int) -> None:
    product = Work("matrix", 1.0)
    steps = [
        Step((0,), (1,), product),
        Step((1,), (2,), COSTLY),
        Step((2, 1) if is_read_later else (2,), (3,), product),
    ]
    graph = Graph(
        forward=tuple(steps),
        backward=(),
        bytes=(8, 8, 8, 8),
        inputs=frozenset((0,)),
        outputs=frozenset((3,)),
        residuals=frozenset(),
        has_cpu_kernels=True,
    )
    assert max(compute_live_bytes(graph, steps)) == live


class _Gated(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.norm = nnx.RMSNorm(WIDTH, rngs=rngs)
        self.gate, self.up = (nnx.Linear(WIDTH, 4 * WIDTH, use_bias=False, rngs=rngs) for _ in range(2))
        self.down = nnx.Linear(4 * WIDTH, WIDTH, use_bias=False, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        hidden = self.norm(x)
        return x + self.down(jax.nn.silu(self.gate(hidden)) * self.up(hidden))


class _Biased(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.up, self.down = nnx.Linear(WIDTH, 4 * WIDTH, rngs=rngs), nnx.Linear(4 * WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return x + self.down(jax.nn.gelu(self.up(self.norm(x))))


class _Tower(nnx.Module):
    def __init__(self, block: Any) -> None:
        rngs = nnx.Rngs(0)
        self.layers = nnx.List([block(rngs) for _ in range(3)])

    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in self.layers:
            x = layer(x)
        return x


def _loss(model: Any, x: jax.Array) -> jax.Array:
    return jnp.mean(model(x) ** 2)


def _make_call(block: Any, kind: AxisType | None) -> tuple[Any, Any]:
    model = nnx.eval_shape(lambda: _Tower(block))
    if kind is None:
        return model, jax.ShapeDtypeStruct((16, 64, WIDTH), jnp.float32)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    replicated, sharded = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("data"))
    nnx.update(model, jax.tree.map(lambda a: _shard(a, replicated), nnx.state(model)))
    return model, jax.ShapeDtypeStruct((8 * 16, 64, WIDTH), jnp.float32, sharding=sharded)


def _shard(leaf: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _compute_median_error(space: Space, measure: Any) -> float:
    places = np.linspace(0, len(space.bytes) - 1, 4).round().astype(int)
    numbers = np.argsort(space.bytes, kind="stable")[places]
    compiled = np.array([measure(write_rules(space, space.assignments[number])) for number in numbers])
    return float(np.median(np.abs(space.bytes[numbers] - compiled) / compiled))


@pytest.mark.parametrize(
    ("block", "kind"),
    [
        pytest.param(_Gated, None, id="gated-one-device"),
        pytest.param(_Gated, AxisType.Explicit, id="gated-Explicit"),
        pytest.param(_Biased, AxisType.Auto, id="biased-Auto"),
    ],
)
def test_predictions_before_any_compile_are_within_15_percent(block: Any, kind: AxisType | None) -> None:
    model, x = _make_call(block, kind)
    target = rt.find_target("cpu")

    @functools.cache
    def measure(rules: rt.Rules) -> int:
        with use_rules(model, rules):
            return rt.measure(_loss, model, x, differentiate=True, target=target).temp_bytes

    errors = []
    for has_cpu_kernels in (True, False):
        rates = dataclasses.replace(get_rates("cpu"), has_cpu_kernels=has_cpu_kernels)
        errors.append(_compute_median_error(Space(build_outline(_loss, model, (x,), rates, target=target)), measure))
    assert errors[0] < 0.15
    assert errors[1] > errors[0]  # control: the same without the compiler's kernels
