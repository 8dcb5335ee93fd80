# SPDX-License-Identifier: Apache-2.0
"""One frontier per model, compiled once, keeps every budget; what is in the cache is not compiled again."""

import dataclasses
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import remattools as rt

from ..models import MLP, Tower, loss
from .search.test_to_rules import Children


class Normed(nnx.Module):
    """State that changes in the forward pass."""

    def __init__(self, width: int, rngs: nnx.Rngs) -> None:
        self.up = nnx.Linear(width, width, rngs=rngs)
        self.norm = nnx.BatchNorm(width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return x + jnp.sin(jnp.cos(self.norm(self.up(x))))


MODELS = {
    "tower": (lambda: Tower(4, 32, block=MLP), (4, 64, 32)),
    "children": (Children, (2, 64, 16)),
    "batchnorm": (lambda: Tower(3, 16, block=Normed), (4, 64, 16)),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return tmp_path_factory.mktemp("measured")


def _subject(name: str) -> tuple[Any, Any]:
    make, shape = MODELS[name]
    return nnx.eval_shape(make), jax.ShapeDtypeStruct(shape, jnp.float32)


def _frontier(name: str, folder: pathlib.Path, **options: Any) -> rt.Frontier:
    model, x = _subject(name)
    return rt.frontier(loss, model, x, of="temp", target="cpu", cache=folder, **({"max_compiles": 5} | options))


@pytest.mark.parametrize("name", MODELS)
def test_one_frontier_keeps_ten_budgets(name: str, folder: pathlib.Path) -> None:
    found = _frontier(name, folder)
    assert len(found.best) >= 2  # control: there is something to choose
    assert found.least_bytes < 0.9 * found.plain_bytes
    model, x = _subject(name)
    for budget in np.linspace(found.least_bytes, found.plain_bytes, 10).astype(int):
        plan = found.plan(int(budget))
        own = next(point for point in found.points if point.rules == plan.rules)
        assert own.bytes <= budget
        assert not any(point.bytes <= budget and point.cycles < own.cycles for point in found.points)
        with rt.applied(model, plan.rules):  # what was promised is what the compiler says now
            measured = rt.measure(loss, model, x, target="cpu", differentiate=True, cache=folder)
        assert measured.temp_bytes == plan.measured.temp_bytes <= budget


def test_a_frontier_is_compiled_once(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    first = _frontier("tower", folder)
    lines: list[str] = []
    again = _frontier("tower", folder, progress=lines.append)
    assert {point.rules for point in again.points} == {point.rules for point in first.points}
    assert len(lines) == 1  # the plain model, which is in the cache
    assert sum(point.measured.compile_s for point in again.points) == sum(p.measured.compile_s for p in first.points)
    _frontier("tower", tmp_path / "empty", max_compiles=3, progress=lines.append)
    assert len(lines) == 4  # control: nothing is known without the cache


def test_a_plan_begins_with_what_is_known(folder: pathlib.Path) -> None:
    known = _frontier("tower", folder)
    model, x = _subject("tower")
    plan = rt.plan(loss, model, x, budget=0.7, of="temp", target="cpu", cache=folder, time_limit_s=0.0)
    assert len(plan.points) == len(known.points)
    bare = rt.plan(loss, model, x, budget=1.0, of="temp", target="cpu", time_limit_s=0.0)
    assert len(bare.points) == 1  # control


def test_notes_of_another_program_are_left_out(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    _frontier("tower", folder)
    (note,) = [path for path in folder.glob("plan-*.json") if path.stat().st_size > 2][:1]
    (tmp_path / note.name).write_text(note.read_text())
    other = _frontier("tower", tmp_path, max_compiles=2)
    assert len(other.points) == 2  # the notes are there, their measurements are not
    for broken in ("", "[1]", "[" * 100_000, "[\"[[remat.rule]]\\npattern = 'nowhere'\"]"):
        for path in tmp_path.glob("plan-*.json"):
            path.write_text(broken)
        assert len(_frontier("tower", tmp_path, max_compiles=2).points) == 2


def test_a_frontier_reads_budgets_as_a_plan_does(folder: pathlib.Path) -> None:
    found = _frontier("tower", folder)
    assert found.plan(0.9).budget_bytes == int(0.9 * found.plain_bytes)
    slow = max(point.cycles for point in found.best)
    assert found.plan(max_cycles=slow).measured.temp_bytes == found.least_bytes
    with pytest.raises(rt.BudgetError, match=str(found.least_bytes)):
        found.plan(found.least_bytes - 1)
    with pytest.raises(rt.BudgetError, match="neither"):
        found.plan()
    assert found.plan(np.int64(10**9)).budget_bytes == 10**9
    assert found.plan(np.float32(0.5 * found.least_bytes / found.plain_bytes + 0.5)).budget_bytes < found.plain_bytes


def test_what_two_limits_leave_over_is_said(folder: pathlib.Path) -> None:
    found = _frontier("tower", folder)
    quick = min(point.cycles for point in found.points)
    within = min(point.cycles for point in found.points if point.bytes <= found.least_bytes)
    assert within > quick + 1  # else nothing is asked here
    with pytest.raises(rt.BudgetError) as caught:
        found.plan(found.least_bytes, max_cycles=quick)
    assert f"max_cycles={int(within) + 1}," in caught.value.fix
    assert found.plan(found.least_bytes, max_cycles=int(within) + 1).measured.temp_bytes == found.least_bytes


def test_temporaries_in_the_chips_own_memory_are_told_of(folder: pathlib.Path) -> None:
    found = _frontier("tower", folder)
    assert "VMEM" not in str(found)
    first, *others = found.points
    small = dataclasses.replace(first.measured, target="tpu:v5e:2x2", peak_bytes=2 * first.measured.total_bytes)
    found = dataclasses.replace(found, points=(dataclasses.replace(first, measured=small), *others))
    assert f"1 of {len(found.points)} points are in on-chip memory" in str(found)
    assert "VMEM" in str(found.plan(1.0))


def test_an_interrupt_returns_what_was_compiled(tmp_path: pathlib.Path) -> None:
    lines: list[str] = []

    def interrupt(line: str) -> None:
        lines.append(line)
        if len(lines) == 3:
            raise KeyboardInterrupt

    found = _frontier("tower", tmp_path, progress=interrupt)
    assert found.ended == found.plan(1.0).ended == "interrupted"
    assert "Ctrl-C" in str(found)
    assert "Ctrl-C" in found.plan(1.0).to_toml()
    assert len(found.points) == 2
    whole = _frontier("tower", tmp_path, max_compiles=2)  # control
    assert whole.ended == "max_compiles"
    assert "ended" not in str(whole) + whole.plan(1.0).to_toml()


def test_a_frontier_is_shown(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    found = _frontier("tower", folder)
    assert str(found).count("\n") == len(found.points) + 1
    assert "time by model" in str(found)
    assert len(found.as_dict()["points"]) == len(found.points)
    found.plot(tmp_path / "curve.svg")
    assert "<svg" in (tmp_path / "curve.svg").read_text()
