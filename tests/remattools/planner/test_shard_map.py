# SPDX-License-Identifier: Apache-2.0
"""A model that runs inside `shard_map` is planned like any other; its blocks have the shapes of one device."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import remattools as rt
from remattools.planner.model.outline import build_outline
from remattools.planner.model.time import get_rates
from remattools.planner.search.space import Space

from ..models import MLP, Tower

DATA = PartitionSpec("data")


class Communicating(nnx.Module):
    """A block with a collective in it."""

    def __init__(self, width: int, rngs: nnx.Rngs) -> None:
        self.mlp = MLP(width, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = jnp.sin(self.mlp(x))
        return x + y - jax.lax.pmean(y.mean(0), "data")


def _make_mesh(kind: AxisType) -> jax.sharding.Mesh:
    return jax.make_mesh((8,), ("data",), axis_types=(kind,))


def _make_batch(mesh: jax.sharding.Mesh) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((2048, 16), jnp.float32, sharding=NamedSharding(mesh, DATA))


def _mean(model: Any, x: jax.Array) -> jax.Array:
    return jax.lax.pmean(jnp.mean(model(x) ** 2), "data")


def _split_loss(mesh: jax.sharding.Mesh, **options: Any) -> Any:
    def loss(model: Any, x: jax.Array) -> jax.Array:
        graphdef, state = nnx.split(model)
        run = jax.shard_map(
            lambda state, x: _mean(nnx.merge(graphdef, state), x),
            mesh=mesh,
            in_specs=(PartitionSpec(), DATA),
            out_specs=PartitionSpec(),
            **options,
        )
        return run(state, x)

    return loss


def _step(mesh: jax.sharding.Mesh) -> Any:
    def update(model: Any, x: jax.Array) -> jax.Array:
        value, gradients = nnx.value_and_grad(lambda model: jnp.mean(model(x) ** 2))(model)
        gradients = jax.lax.pmean(gradients, "data")
        nnx.update(model, jax.tree.map(lambda w, g: w - g, nnx.state(model, nnx.Param), gradients))
        return jax.lax.pmean(value, "data")

    return nnx.jit(nnx.shard_map(update, mesh=mesh, in_specs=(PartitionSpec(), DATA), out_specs=PartitionSpec()))


CASES = {
    "auto": (_split_loss, AxisType.Auto, MLP, {}, True),
    "explicit": (_split_loss, AxisType.Explicit, MLP, {}, True),
    "unchecked": (_split_loss, AxisType.Auto, MLP, {"check_vma": False}, True),
    "collectives in the blocks": (_split_loss, AxisType.Auto, Communicating, {}, True),
    "a whole step": (_step, AxisType.Auto, MLP, {}, False),
}


@pytest.mark.parametrize("name", CASES)
def test_a_model_in_shard_map_is_planned(name: str) -> None:
    make, kind, block, options, differentiate = CASES[name]
    mesh = _make_mesh(kind)
    model, x = nnx.eval_shape(lambda: Tower(3, 16, block=block)), _make_batch(mesh)
    fn = make(mesh, **options)
    found = rt.plan(fn, model, x, budget=0.8, of="temp", target="cpu", max_compiles=3, differentiate=differentiate)
    assert found.measured.temp_bytes <= 0.8 * found.points[0].bytes
    with rt.applied(model, found.rules):
        again = rt.measure(fn, model, x, target="cpu", differentiate=differentiate)
    assert again.temp_bytes == found.measured.temp_bytes


def test_predictions_are_those_of_one_device() -> None:
    mesh = _make_mesh(AxisType.Auto)
    model = nnx.eval_shape(lambda: Tower(3, 16, block=MLP))
    curve = rt.frontier(_split_loss(mesh), model, _make_batch(mesh), of="temp", target="cpu", max_compiles=2)
    space = Space(build_outline(_split_loss(mesh), model, (_make_batch(mesh),), get_rates("cpu")))
    predicted = space.bytes[space.assignments.index(space.plain)]
    assert 0.5 * curve.plain_bytes < predicted < 2 * curve.plain_bytes


def test_the_axes_are_free_again_after_a_plan() -> None:
    mesh = _make_mesh(AxisType.Auto)
    model = nnx.eval_shape(lambda: Tower(2, 16, block=MLP))
    rt.plan(_split_loss(mesh), model, _make_batch(mesh), budget=1.0, target="cpu", max_compiles=2)
    with pytest.raises(NameError, match="data"):
        jax.make_jaxpr(lambda x: jax.lax.psum(x, "data"))(1.0)
