# SPDX-License-Identifier: Apache-2.0
"""Dropout in a plan: a TPU's rules keep the masks, the plan says why, and rbg keys need none of it."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import remattools as rt
from remattools.analysis.random_cost import Redrawn
from remattools.compiler.hlo.live_buffers import LiveBuffer
from remattools.planner.model.outline import build_outline
from remattools.planner.model.time import get_rates
from remattools.planner.notes import collect_notes
from remattools.planner.result import Point, Prediction
from remattools.planner.search.minimum import Minimum
from remattools.planner.search.space import Space
from remattools.planner.search.to_rules import write_rules

from ..models import Tower, loss
from .spaces import exploration

X = jax.ShapeDtypeStruct((4, 256, 32), jnp.float32)
MASKS = "dropout_masks_saveable"


class Attention(nnx.Module):
    def __init__(self, width: int, rngs: nnx.Rngs) -> None:
        self.qkv = nnx.Linear(width, 3 * width, rngs=rngs)
        self.drop = nnx.Dropout(0.1, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        q, k, v = jnp.split(self.qkv(x), 3, axis=-1)
        return x + self.drop(jax.nn.softmax(q @ k.swapaxes(-1, -2))) @ v


def _make_space(implementation: str = "threefry2x32", target: str = "tpu:v5e:2x2", depth: int = 3) -> tuple[Any, Space]:
    def build() -> Tower:
        with jax.default_prng_impl(implementation):
            return Tower(depth, 32, block=Attention)

    model = nnx.eval_shape(build)
    return model, Space(build_outline(loss, model, (X,), get_rates(target)))


def _has_masks(rules: rt.Rules) -> bool:
    return any(action and action.policy is not None and action.policy.has_dropout_masks for _, action in rules)


@pytest.mark.parametrize(
    ("implementation", "target", "keeps"),
    [
        pytest.param("threefry2x32", "tpu:v5e:2x2", True, id="tpu"),
        pytest.param("rbg", "tpu:v5e:2x2", False, id="rbg"),
        pytest.param("threefry2x32", "cpu", False, id="cpu"),
    ],
)
def test_where_drawing_again_is_dear_the_least_that_rules_save_is_masks(
    implementation: str, target: str, keeps: bool
) -> None:
    _, space = _make_space(implementation, target)
    assert write_rules(space, space.full_remat) == rt.Rules(
        {"layers.*": rt.Remat(MASKS) if keeps else rt.Remat(save=())}
    )
    # In every space some rules keep the masks and some do not: both are candidates, whatever is predicted.
    uniform = [one for one in space.assignments if one.group == 1 and one.first == one.rest != len(space.levels) - 1]
    rules = [write_rules(space, one) for one in uniform]
    assert any(map(_has_masks, rules))
    assert not all(map(_has_masks, rules))
    if keeps:  # what is predicted to take less memory keeps them
        smallest = min(uniform, key=lambda one: space.bytes[space.assignments.index(one)])
        assert _has_masks(write_rules(space, smallest))


def test_to_draw_bits_again_is_predicted_to_take_many_times_their_size() -> None:
    _, space = _make_space()
    nothing, kept = (space.bytes[space.assignments.index(one)] for one in (space.assignments[0], space.full_remat))
    bits = 4 * 256 * 256 * 4
    assert nothing > 20 * bits
    assert kept < 10 * bits
    assert space.cycles[0] > space.cycles[space.assignments.index(space.full_remat)]


def test_masks_and_nothing_at_all_are_both_compiled_before_an_error() -> None:
    model, space = _make_space(depth=8)
    some = rt.measure(jnp.sin, jnp.ones(3), target="cpu")
    search = exploration(space, lambda _: some)
    search.compile_assignment(space.assignments.index(space.plain))
    minimum = Minimum(search, model)
    while minimum.compile_next():
        pass
    rules = [point.rules for point in search.all_points][1:]
    assert rules[0] == rt.Rules({"layers.*": MASKS})
    assert rt.Rules({"layers.*": rt.Remat(save=())}) in rules
    assert any(action.group > 1 and _has_masks(one) for one in rules for _, action in one)


def _make_point(rules: rt.Rules, live: tuple[LiveBuffer, ...] = ()) -> Point:
    some = rt.measure(jnp.sin, jnp.ones(3), target="cpu")
    measured = dataclasses.replace(some, target="tpu:v5e:2x2", temp_bytes=100, live=live)
    return Point(rules=rules, predicted=Prediction(bytes=1, cycles=1.0), measured=measured, bytes=100, cycles=1.0)


def test_notes_name_the_cause_and_both_cures() -> None:
    nothing = rt.Rules({"layers.*": rt.Remat()})
    row = LiveBuffer(path="layers.0.drop", operation="_uniform", phase="forward", shape="u32[8]", bytes=90)
    points = [_make_point(rt.Rules()), _make_point(nothing, (row,))]

    def find_redrawn(point: Point) -> tuple[Redrawn, ...]:
        assert point.rules == nothing
        return (Redrawn(path="layers.[0:3].drop", shape="u32[8]", bytes=32, count=3),)

    saved, drawn = collect_notes(_make_space()[1].outline, points, find_redrawn)
    assert MASKS in saved
    assert saved.startswith("regions of layers.[0:3] ")
    assert '"jax_default_prng_impl", "rbg"' in saved
    assert "layers.[0:3].drop" in drawn
    # Control: with keys of another kind there is nothing to say.
    assert collect_notes(_make_space("rbg")[1].outline, points[:1], find_redrawn) == ()


def test_a_plan_and_its_file_say_that_masks_are_kept() -> None:
    rules = rt.Rules({"layers.*": MASKS})
    point = _make_point(rules)
    plan = rt.Plan(
        rules=rules,
        predicted=point.predicted,
        measured=point.measured,
        points=(point,),
        budget_bytes=None,
        of="temp",
        time_by="model",
        subject="a model",
        notes=("keep the masks",),
    )
    assert "layers.*: save dropout masks" in str(plan)
    assert "note: keep the masks" in str(plan)
    assert plan.as_dict()["notes"] == ["keep the masks"]
    assert f'policy = "{MASKS}"' in plan.to_toml()
