# SPDX-License-Identifier: Apache-2.0
"""Few names save exactly what many names save, and modules come before operations."""

from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

import remattools as rt
from remattools.planner.model.outline import build_outline
from remattools.planner.model.time import get_rates
from remattools.planner.search.short_names import BlockNames
from remattools.planner.search.space import Space

from ...models import MLP, Block, Tower, loss

X = jax.ShapeDtypeStruct((2, 16, 16), jnp.float32)


class Gated(nnx.Module):
    """Two norms, two similar projections, an activation in a jit, and a name of the user's."""

    def __init__(self, width: int, rngs: nnx.Rngs) -> None:
        self.q_norm, self.k_norm = nnx.LayerNorm(width, rngs=rngs), nnx.LayerNorm(width, rngs=rngs)
        self.gate, self.up = nnx.Linear(width, 4 * width, rngs=rngs), nnx.Linear(width, 4 * width, rngs=rngs)
        self.down, self.drop = nnx.Linear(4 * width, width, rngs=rngs), nnx.Dropout(0.1, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        gated = nnx.silu(self.gate(self.q_norm(x))) * jnp.exp(self.up(self.k_norm(x)))
        return x + self.drop(self.down(checkpoint_name(gated, "gated")))


class Shared(nnx.Module):
    """A module whose output is also read inside of it, and one that is called twice."""

    class Inner(nnx.Module):
        def __init__(self, width: int, rngs: nnx.Rngs) -> None:
            self.linear = nnx.Linear(width, width, rngs=rngs)

        def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
            y = jnp.sin(self.linear(x))
            return y, jnp.cos(y)

    def __init__(self, width: int, rngs: nnx.Rngs) -> None:
        self.inner, self.norm = Shared.Inner(width, rngs), nnx.LayerNorm(width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        a, b = self.inner(self.norm(x))
        return x + self.norm(a * b)


def _make(block: Any) -> tuple[Any, Space]:
    model = nnx.eval_shape(lambda: Tower(2, 16, block=block))
    return model, Space(build_outline(loss, model, (X,), get_rates("tpu:v5e:2x2")))


def _collect_residuals(model: Any, save: tuple[str, ...]) -> Counter[Any]:
    with rt.applied(model, {"layers.*": rt.Remat(save=save)}):
        return Counter((row.shape, str(row.dtype)) for row in rt.residuals(loss, model, X).rows)


@pytest.mark.parametrize("block", [Block, MLP, Gated, Shared], ids=lambda block: block.__name__)
def test_few_names_save_the_same(block: Any) -> None:
    model, space = _make(block)
    names, saved = space.block_names[0], 0
    choices = {level[0].names for level in space.levels if level[0].names}
    for chosen in sorted(choices, key=len)[:: max(len(choices) // 6, 1)]:
        short = names.abbreviate(chosen)
        assert len(short) <= len(chosen)
        assert _collect_residuals(model, short) == _collect_residuals(model, chosen)
        saved += len(chosen) - len(short)
    assert block in (MLP, Shared) or saved > 0  # control: there is something to shorten


def _shorten(block: Any, *chosen: str) -> tuple[str, ...]:
    names: BlockNames = _make(block)[1].block_names[0]
    return names.abbreviate(chosen)


@pytest.mark.parametrize(
    ("block", "chosen", "expected"),
    [
        pytest.param(Gated, ("gate:add[0]",), ("gate",), id="the output of a module"),
        pytest.param(Gated, ("gate:add[0]", "up:add[0]"), ("gate", "up"), id="several modules"),
        pytest.param(Gated, ("q_norm:rsqrt[0]", "k_norm:rsqrt[0]"), ("*_norm:rsqrt",), id="a pattern for siblings"),
        pytest.param(Gated, ("@gated[0]",), ("@gated",), id="a name of the user"),
        pytest.param(Shared, ("inner:sin[0]",), ("inner:sin",), id="a module that returns more than this"),
        pytest.param(Shared, ("norm:rsqrt[1]",), ("norm:rsqrt[1]",), id="one call of two"),
        pytest.param(Shared, (), (), id="nothing"),
    ],
)
def test_a_person_would_write_these_names(block: Any, chosen: tuple[str, ...], expected: tuple[str, ...]) -> None:
    assert _shorten(block, *chosen) == expected


def test_names_of_another_block_are_used_if_they_mean_the_same() -> None:
    _, space = _make(Gated)
    names = space.block_names[0]
    assert names.is_equal(("gate",), ("gate:add[0]",))
    assert not names.is_equal(("gate", "up"), ("gate:add[0]",))  # too much
    assert not names.is_equal(("gate",), ("gate:add[0]", "up:add[0]"))  # too little
    assert not names.is_equal(("gate", "missing"), ("gate:add[0]",))  # a name that matches nothing is an error
