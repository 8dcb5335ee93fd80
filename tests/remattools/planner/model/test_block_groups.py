# SPDX-License-Identifier: Apache-2.0
"""Blocks are grouped where that takes less memory, and only where they can be."""

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import remattools as rt
from remattools.planner.model.memory import compute_boundary_bytes
from remattools.planner.search.assignments import Assignment
from remattools.planner.search.to_rules import write_rules

from ...exactness import assert_exact
from ...models import Tower, inputs, loss
from ..spaces import DEPTH, SHAPE, Light, exploration, light_tower, space_of


class Twice(Tower):
    """Every block runs twice, so no group is a contiguous part of the program."""

    def __call__(self, x: jax.Array) -> jax.Array:
        for _ in range(2):
            for layer in self.layers:
                x = layer(x)
        return x


class Skipping(Tower):
    """The input of each block is read again later, so a group saves it anyway."""

    def __call__(self, x: jax.Array) -> jax.Array:
        seen = []
        for layer in self.layers:
            seen.append(x)
            x = layer(x)
        return x + sum(seen[1:])


def _temp_bytes(model: Any, rules: Any) -> int:
    with rt.applied(model, rules):
        return rt.measure(
            loss, model, jax.ShapeDtypeStruct(SHAPE, jnp.float32), target="cpu", differentiate=True
        ).temp_bytes


def test_every_grouping_applies_and_predictions_order_them() -> None:
    model, space = space_of(light_tower)
    single = _temp_bytes(model, write_rules(space, space.full_remat))
    expected = space.bytes[space.assignments.index(space.full_remat)]
    for size in {assignment.group for assignment in space.assignments} - {1}:
        number = space.assignments.index(Assignment(0, 0, DEPTH, size))
        rules = write_rules(space, space.assignments[number])
        assert [(p.text, a.group) for p, a in rules] == [("layers.*", size)]
        cheaper = _temp_bytes(model, rules) < single
        assert cheaper == (space.bytes[number] < expected)
    assert min(space.bytes) < 0.8 * expected  # control: there is something to gain


def test_rules_of_a_partly_grouped_model_use_slices() -> None:
    _, space = space_of(light_tower)
    rules = write_rules(space, Assignment(0, 0, 8, 4))
    assert [(p.text, a.group) for p, a in rules] == [("layers.[:8]", 4), ("layers.[8:]", 1)]
    last = len(space.levels) - 1
    assert [(p.text, a.group) for p, a in write_rules(space, Assignment(0, last, 8, 2))] == [("layers.[:8]", 2)]


@pytest.mark.parametrize("make", [Twice, lambda: Tower(3)], ids=["run twice", "too short"])
def test_what_cannot_be_grouped_is_not(make: Any) -> None:
    _, space = space_of(make, inputs().shape)
    assert {assignment.group for assignment in space.assignments} == {1}


def test_inputs_that_others_read_are_not_counted_as_saved() -> None:
    _, single = space_of(light_tower)
    _, skipping = space_of(lambda: Skipping(DEPTH, SHAPE[-1], block=Light))
    alone, shared = (compute_boundary_bytes(s.outline.around, s.outline.calls) for s in (single, skipping))
    assert alone[1:] == (SHAPE[0] * SHAPE[1] * 4,) * (DEPTH - 1)
    assert set(shared) == {0}


def test_a_frontier_goes_below_one_region_for_each_block(tmp_path: pathlib.Path) -> None:
    model = nnx.eval_shape(light_tower)
    x = jax.ShapeDtypeStruct(SHAPE, jnp.float32)
    found = rt.frontier(loss, model, x, of="temp", target="cpu", max_compiles=6, cache=tmp_path)
    assert found.least_bytes < 0.9 * _temp_bytes(model, {"layers.*": "nothing_saveable"})
    plan = found.plan(found.least_bytes)
    assert any(action.group != 1 for _, action in plan.rules)
    assert "in a region" in str(plan)
    assert rt.Rules.from_toml(plan.to_toml()) == plan.rules
    assert _temp_bytes(model, plan.rules) == plan.measured.temp_bytes
    plain = light_tower()
    assert_exact(loss, plain, rt.apply(nnx.clone(plain), plan.rules), jax.random.normal(jax.random.key(1), SHAPE))


def test_groups_that_a_program_does_not_allow_are_given_up() -> None:
    _, space = space_of(light_tower)
    some = rt.measure(jnp.sin, jnp.ones(3), target="cpu")

    def refuses(rules: rt.Rules) -> rt.Measurement:
        if any(action.group != 1 for _, action in rules):
            raise rt.RuleError(what="no.", why="no.", fix="no.")
        return some

    search = exploration(space, refuses)
    grouped = next(n for n, assignment in enumerate(space.assignments) if assignment.group > 1)
    search.compile_assignment(grouped)
    assert not search.points
    search.compile_assignment(space.assignments.index(space.plain))
    for _ in range(4):
        number = search.propose_for_frontier()
        if number is None:
            break
        assert space.assignments[number].group == 1
        search.compile_assignment(number)
    search.measure_rules = refuses_everything
    with pytest.raises(rt.RuleError):  # a rule of the planner's own that is wrong is not hidden
        search.compile_assignment(
            next(n for n, a in enumerate(space.assignments) if a.group == 1 and n not in search.points)
        )


def refuses_everything(rules: rt.Rules) -> rt.Measurement:
    raise rt.RuleError(what="no.", why="no.", fix="no.")
