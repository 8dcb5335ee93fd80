# SPDX-License-Identifier: Apache-2.0
"""Saving nothing is compiled before a budget is called unreachable, whatever was predicted of it."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import remattools as rt
from remattools.compiler.out_of_memory import OutOfMemory
from remattools.planner import plan as planning
from remattools.planner.search.minimum import Minimum
from remattools.planner.search.to_rules import write_rules

from ...models import MLP, Tower, loss
from ..spaces import exploration, light_tower, space_of

X = jax.ShapeDtypeStruct((4, 64, 32), jnp.float32)


def _make_search(temp_bytes: int = 10**6) -> tuple[Any, Any]:
    model, space = space_of(light_tower)
    some = dataclasses.replace(rt.measure(jnp.sin, jnp.ones(3), target="cpu"), temp_bytes=temp_bytes)
    search = exploration(space, lambda _: some)
    search.compile_assignment(space.assignments.index(space.plain))
    return search, model


def test_every_block_comes_first_and_then_its_groups() -> None:
    search, model = _make_search()
    minimum = Minimum(search, model)
    assert not minimum.is_compiled
    while minimum.compile_next():
        pass
    assert minimum.is_compiled
    _, first, *others = search.all_points
    assert first.rules == write_rules(search.space, search.space.full_remat)
    assert others
    assert all(action.group > 1 and not action.save for point in others for _, action in point.rules)


def test_what_is_compiled_already_is_not_compiled_again() -> None:
    search, model = _make_search()
    search.compile_assignment(search.space.assignments.index(search.space.full_remat))
    count = len(search.all_points)
    minimum = Minimum(search, model)
    minimum.compile_next()
    assert search.all_points[count].rules != search.all_points[count - 1].rules


class Stage(nnx.Module):
    """A block with blocks inside, in which the planner chooses among the inner ones."""

    def __init__(self, width: int, rngs: nnx.Rngs) -> None:
        self.blocks = nnx.List([MLP(width, rngs) for _ in range(2)])

    def __call__(self, x: jax.Array) -> jax.Array:
        for block in self.blocks:
            x = jnp.sin(block(x))
        return x


def _plan_with(monkeypatch: pytest.MonkeyPatch, model: Any, sizes: Any, **options: Any) -> rt.Plan:
    """Plan with a compiler that reports these temporaries for rules."""
    real = planning.measure
    state: dict[str, Any] = {}

    def report(fn: Any, model: Any, *batch: Any, **rest: Any) -> rt.Measurement:
        if "plain" not in state:
            state["plain"] = real(fn, model, *batch, **rest)
        actions = {row.path: row.action for row in rt.explain(model).regions}
        return sizes(state["plain"], actions)

    monkeypatch.setattr(planning, "measure", report)
    return rt.plan(loss, model, X, of="temp", target="cpu", **options)


def _size(plain: rt.Measurement, share: float) -> rt.Measurement:
    return dataclasses.replace(plain, temp_bytes=int(share * plain.temp_bytes))


def test_a_surprise_in_saving_nothing_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two compiles are allowed and spent otherwise; only saving nothing everywhere is within the budget."""

    def sizes(plain: rt.Measurement, actions: dict[str, Any]) -> rt.Measurement:
        saves_nothing = len(actions) == 4 and not any(action.save or action.group > 1 for action in actions.values())
        return _size(plain, 0.3 if saves_nothing else 1.0)

    model = nnx.eval_shape(lambda: Tower(4, 32, block=MLP))
    found = _plan_with(monkeypatch, model, sizes, budget=0.35, max_compiles=2)
    assert found.measured.temp_bytes <= found.budget_bytes


@pytest.mark.parametrize("size", [2, 4])
def test_a_surprise_in_a_group_is_found(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    def sizes(plain: rt.Measurement, actions: dict[str, Any]) -> rt.Measurement:
        is_grouped = bool(actions) and all(action.group == size for action in actions.values())
        return _size(plain, 0.3 if is_grouped else 1.0)

    model = nnx.eval_shape(lambda: Tower(8, 32, block=MLP))
    found = _plan_with(monkeypatch, model, sizes, budget=0.35, max_compiles=2)
    assert {action.group for _, action in found.rules} == {size}


def test_the_outer_blocks_are_tried_where_the_inner_ones_were_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    def sizes(plain: rt.Measurement, actions: dict[str, Any]) -> rt.Measurement:
        saves_nothing = set(actions) == {"layers.0", "layers.1"} and not any(one.save for one in actions.values())
        return _size(plain, 0.3 if saves_nothing else 1.0)

    model = nnx.eval_shape(lambda: Tower(2, 32, block=Stage))
    found = _plan_with(monkeypatch, model, sizes, budget=0.35, max_compiles=2)
    assert [pattern.text for pattern, _ in found.rules] == ["layers.*"]


def test_nothing_more_is_compiled_once_a_budget_is_met(monkeypatch: pytest.MonkeyPatch) -> None:
    """Control: the plain model meets the budget, so that one compile is enough."""
    model = nnx.eval_shape(lambda: Tower(4, 32, block=MLP))
    found = _plan_with(monkeypatch, model, lambda plain, _: plain, budget=1.0)
    assert len(found.points) == 1
    assert not len(found.rules)


def test_the_search_goes_on_after_a_late_success(monkeypatch: pytest.MonkeyPatch) -> None:
    def sizes(plain: rt.Measurement, actions: dict[str, Any]) -> rt.Measurement:
        return _size(plain, 0.3 if len(actions) == 4 else 1.0)

    model = nnx.eval_shape(lambda: Tower(4, 32, block=MLP))
    found = _plan_with(monkeypatch, model, sizes, budget=0.35, max_compiles=6)
    assert found.measured.temp_bytes <= found.budget_bytes
    assert len(found.points) >= 2


def _refuse(plain: rt.Measurement, needed: int) -> rt.Measurement:
    reason = OutOfMemory(needed_bytes=needed, limit_bytes=1, message="full")
    return dataclasses.replace(plain, temp_bytes=needed, peak_bytes=needed, out_of_memory=reason)


def test_a_plan_goes_on_from_a_plain_program_that_runs_out_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def sizes(plain: rt.Measurement, actions: dict[str, Any]) -> rt.Measurement:
        if len(actions) < 4:
            return _refuse(plain, plain.temp_bytes)
        return _size(plain, 0.5)

    model = nnx.eval_shape(lambda: Tower(4, 32, block=MLP))
    found = _plan_with(monkeypatch, model, sizes, budget=0.6)
    assert found.measured.fits
    assert not found.points[0].measured.fits
    assert "OOM" in str(found)


def test_the_minimum_reached_is_that_of_programs_that_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    def sizes(plain: rt.Measurement, actions: dict[str, Any]) -> rt.Measurement:
        return plain if not actions else _refuse(plain, 1)

    model = nnx.eval_shape(lambda: Tower(4, 32, block=MLP))
    with pytest.raises(rt.BudgetError) as caught:
        _plan_with(monkeypatch, model, sizes, budget=0.5)
    assert "the minimum reached is" in caught.value.what
    assert "the minimum reached is 1 bytes" not in caught.value.what


def test_where_everything_runs_out_of_memory_no_budget_is_suggested(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nnx.eval_shape(lambda: Tower(4, 32, block=MLP))
    with pytest.raises(rt.BudgetError, match="every program runs out of memory") as caught:
        _plan_with(monkeypatch, model, lambda plain, _: _refuse(plain, 2**40), budget="1GiB")
    assert "budget=" not in caught.value.fix
