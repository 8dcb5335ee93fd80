# SPDX-License-Identifier: Apache-2.0
"""Values in host memory: considered where a loop stacks them, and priced by the transfer."""

import dataclasses
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import remattools as rt
from remattools.planner.model.outline import build_outline
from remattools.planner.model.time import get_rates
from remattools.planner.search.space import Space
from remattools.planner.search.to_rules import write_rules

from ..models import loss
from .test_loops import Listed, Scanned

X = jax.ShapeDtypeStruct((4, 6, 16), jnp.float32)


def space_with(link_bytes: float, make: Any = Scanned) -> Space:
    rates = dataclasses.replace(get_rates("tpu:v5e:2x2"), link_bytes=link_bytes)
    return Space(build_outline(loss, nnx.eval_shape(make), (X,), rates))


def test_offloading_costs_what_the_link_takes() -> None:
    fast, slow = space_with(1e12), space_with(1e-3)
    pairs = [(n, fast.assignments.index(dataclasses.replace(a, offload=False))) for n, a in enumerate(fast.assignments)]
    pairs = [(offloaded, saved) for offloaded, saved in pairs if offloaded != saved]
    assert pairs
    for offloaded, saved in pairs:
        assert fast.bytes[offloaded] < fast.bytes[saved]
        assert fast.cycles[offloaded] == pytest.approx(fast.cycles[saved])  # all of it overlaps with computation
        assert slow.link_cycles[offloaded] > 0
        assert slow.cycles[offloaded] == pytest.approx(slow.cycles[saved] + slow.link_cycles[offloaded])
        assert slow.link_cycles[saved] == 0


def test_rules_of_an_offloading_assignment_offload() -> None:
    space = space_with(10.0)
    written = [write_rules(space, a) for a in space.assignments if a.offload]
    assert all(action.offload and not action.save for rules in written for _, action in rules)
    assert not any(action.offload for a in space.assignments if not a.offload for _, action in write_rules(space, a))


def test_offloading_does_not_change_the_other_corrections() -> None:
    without, offloading = space_with(0.0), space_with(10.0)
    count = len(without.assignments)
    assert offloading.assignments[:count] == without.assignments
    assert len(offloading.assignments) > count
    # Several measurements, since one alone corrects a constant only.
    measured = {number: 1e6 * (number + 1) for number in (0, 1, count - 1)}
    for kind in ("bytes", "cycles"):
        for alone, together in zip(
            without.correct_predictions(kind, measured),
            offloading.correct_predictions(kind, measured),
            strict=True,
        ):
            np.testing.assert_allclose(together[:count], alone, rtol=1e-6)


@pytest.mark.parametrize(
    ("link_bytes", "make"),
    [pytest.param(0.0, Scanned, id="no host memory"), pytest.param(10.0, Listed, id="no loop")],
)
def test_useless_offloading_is_not_searched(link_bytes: float, make: Any) -> None:
    assert not any(a.offload for a in space_with(link_bytes, make).assignments)


def test_a_plan_offloads_where_the_link_is_fast(monkeypatch: pytest.MonkeyPatch, tpu: str) -> None:
    """By the TPU's compiler; with the link of a real chip recomputing is cheaper for layers of this width."""
    planner = sys.modules["remattools.planner.plan"]
    model = nnx.eval_shape(lambda: Wide(6))
    x = jax.ShapeDtypeStruct((4096, 512), jnp.float32)

    rates = dataclasses.replace(get_rates(tpu), link_bytes=1e9)
    monkeypatch.setattr(planner, "get_rates", lambda _: rates)
    points = rt.frontier(loss, model, x, of="temp", target=tpu, max_compiles=4).points
    offloading = [point for point in points if any(action.offload for _, action in point.rules)]
    assert offloading
    assert all(point.measured.host_temp_bytes > 0 for point in offloading)
    assert min(point.bytes for point in offloading) < points[0].bytes / 2


class Wide(nnx.Module):
    """Products in a scan."""

    def __init__(self, length: int) -> None:
        make = nnx.vmap(lambda rngs: Layer(rngs))
        self.stack = nnx.split_rngs(splits=length)(make)(nnx.Rngs(0))

    def __call__(self, x: jax.Array) -> jax.Array:
        return nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.stack)


class Layer(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.up = nnx.Linear(512, 1024, use_bias=False, rngs=rngs)
        self.down = nnx.Linear(1024, 512, use_bias=False, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return x + self.down(jnp.sin(self.up(x)))
