# SPDX-License-Identifier: Apache-2.0
"""Plans on a mesh: predictions and budgets are per device."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import remattools as rt
from remattools.planner.model.outline import build_outline
from remattools.planner.model.time import get_rates
from remattools.planner.search.space import Space

WIDTH, ROWS = 16, 256


class _Block(nnx.Module):
    def __init__(self, rngs):
        self.up, self.down = nnx.Linear(WIDTH, 4 * WIDTH, rngs=rngs), nnx.Linear(4 * WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x):
        return x + self.down(jnp.sin(jnp.cos(self.up(x))))


class _Net(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.layers = nnx.List([_Block(rngs) for _ in range(6)])

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def _loss(model, x):
    return jnp.mean(model(x) ** 2)


def _make_call(kind):
    model = nnx.eval_shape(_Net)
    if kind is None:
        return model, jax.ShapeDtypeStruct((ROWS, WIDTH), jnp.float32)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))

    def place(leaf):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, PartitionSpec()))

    nnx.update(model, jax.tree.map(place, nnx.state(model)))
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    return model, jax.ShapeDtypeStruct((8 * ROWS, WIDTH), jnp.float32, sharding=sharding)


def test_predictions_on_a_mesh_are_those_of_one_device():
    outlines = []
    for kind in (None, AxisType.Auto):
        model, x = _make_call(kind)
        outlines.append(build_outline(_loss, model, (x,), get_rates("cpu"), target=rt.find_target("cpu")))
    alone, sharded = outlines
    assert sharded.problems[0].graph.bytes == alone.problems[0].graph.bytes
    assert sharded.count_plain_cycles() == pytest.approx(alone.count_plain_cycles(), rel=0.05)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["Auto", "Explicit"])
def test_a_budget_on_a_mesh_is_kept(kind):
    model, x = _make_call(kind)
    plan = rt.plan(_loss, model, x, budget=0.4, of="temp", target="cpu", max_compiles=5)
    plain = next(point for point in plan.points if not len(point.rules))
    assert plan.measured.temp_bytes <= 0.4 * plain.bytes
    space = Space(build_outline(_loss, model, (x,), get_rates("cpu"), target=rt.find_target("cpu")))
    assert space.bytes[space.assignments.index(space.plain)] == pytest.approx(plain.bytes, rel=0.3)
