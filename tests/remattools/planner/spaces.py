# SPDX-License-Identifier: Apache-2.0
"""Search spaces of small models, and searches in them with made-up measurements."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from remattools.planner.model.outline import build_outline
from remattools.planner.model.time import get_rates
from remattools.planner.search.exploration import Exploration
from remattools.planner.search.space import Space
from remattools.terminal.progress import CompileLog

from ..models import Tower, loss

DEPTH, SHAPE = 16, (512, 32)


class Light(nnx.Module):
    """Its backward pass needs little besides its input."""

    def __init__(self, width: int, rngs: nnx.Rngs) -> None:
        self.up = nnx.Linear(width, width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return x + jax.nn.gelu(self.up(x))


class Gated(nnx.Module):
    """Four values that a rule can name."""

    def __init__(self, width: int, rngs: nnx.Rngs) -> None:
        self.gate, self.up = (nnx.Param(jnp.ones((width, 2 * width))) for _ in range(2))
        self.down = nnx.Param(jnp.ones((2 * width, width)))

    def __call__(self, x: jax.Array) -> jax.Array:
        return x + (jnp.sin(x @ self.gate[...]) * (x @ self.up[...])) @ self.down[...]


def space_of(make: Any, shape: tuple[int, ...] = SHAPE) -> tuple[Any, Space]:
    model = nnx.eval_shape(make)
    return model, Space(build_outline(loss, model, (jax.ShapeDtypeStruct(shape, jnp.float32),), get_rates("cpu")))


def light_tower() -> Tower:
    return Tower(DEPTH, SHAPE[-1], block=Light)


def exploration(space: Space, measured_by: Any) -> Exploration:
    return Exploration(
        space=space,
        measure_rules=measured_by,
        of="temp",
        plain_cycles=space.outline.count_plain_cycles(),
        log=CompileLog(lambda _: None),
    )
