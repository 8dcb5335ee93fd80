# SPDX-License-Identifier: Apache-2.0
"""Rules of a plan are few, mean what was decided, and are found without tracing each layer."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import remattools as rt
from remattools.planner.model.outline import build_outline
from remattools.planner.model.time import get_rates
from remattools.planner.search.assignments import Assignment
from remattools.planner.search.space import Space
from remattools.planner.search.to_rules import write_rules

from ...models import MLP, Block, Tower, loss


class Mixed(nnx.Module):
    """Two kinds of blocks, alternating."""

    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.layers = nnx.List([(MLP if index % 2 else Block)(16, rngs) for index in range(6)])

    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in self.layers:
            x = layer(x)
        return x


class Children(nnx.Module):
    """No sequence at all."""

    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.first, self.second = MLP(16, rngs), Block(16, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.second(self.first(x))


class Normed(nnx.Module):
    """State that changes in the forward pass, and random numbers."""

    def __init__(self, width: int, rngs: nnx.Rngs) -> None:
        self.conv = nnx.Conv(width, width, (3,), rngs=rngs)
        self.norm = nnx.BatchNorm(width, rngs=rngs)
        self.drop = nnx.Dropout(0.1, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return x + self.drop(nnx.relu(self.norm(self.conv(x))))


def _space(make: Any) -> tuple[Any, Space]:
    model = nnx.eval_shape(make)
    x = jax.ShapeDtypeStruct((2, 16, 16), jnp.float32)
    return model, Space(build_outline(loss, model, (x,), get_rates("tpu:v5e:2x2")))


MODELS = [
    pytest.param(lambda: Tower(5, 16), id="tower"),
    pytest.param(Mixed, id="mixed"),
    pytest.param(Children, id="children"),
    pytest.param(lambda: Tower(3, 16, block=Normed), id="batchnorm"),
]


@pytest.mark.parametrize("make", MODELS)
def test_every_assignment_can_be_applied(make: Any) -> None:
    """Each name matches, and each block has the action that was decided for it."""
    model, space = _space(make)
    x = jax.ShapeDtypeStruct((2, 16, 16), jnp.float32)
    kinds = dict(space.outline.visits)
    for assignment in [*space.assignments[: len(space.levels)], space.assignments[-1]]:
        rules = write_rules(space, assignment)
        with rt.applied(model, rules):
            actions = {row.path: row.action for row in rt.explain(model).rows}
            rt.residuals(loss, model, x)  # raises if a name matches nothing
        for number, path in enumerate(space.members):
            choice = space.levels[assignment.get_level(number)][kinds[path]]
            assert (actions[".".join(map(str, path))] is None) == (choice.names is None)


def test_rules_are_few_and_use_slices() -> None:
    _, space = _space(lambda: Tower(8, 16))
    last = len(space.levels) - 1
    assert [p.text for p, _ in write_rules(space, Assignment(0, 0, 0))] == ["layers.*"]
    assert [p.text for p, _ in write_rules(space, Assignment(0, last, 6))] == ["layers.[:6]"]
    assert [p.text for p, _ in write_rules(space, Assignment(0, 1, 6))] == ["layers.[:6]", "layers.[6:]"]
    assert len(write_rules(space, space.plain)) == 0
