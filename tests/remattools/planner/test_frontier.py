# SPDX-License-Identifier: Apache-2.0
"""A frontier is compiled once and answers every budget; programs in the cache are not compiled again."""

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
def directory(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return tmp_path_factory.mktemp("measured")


def _subject(name: str) -> tuple[Any, Any]:
    make, shape = MODELS[name]
    return nnx.eval_shape(make), jax.ShapeDtypeStruct(shape, jnp.float32)


def _frontier(name: str, directory: pathlib.Path, **options: Any) -> rt.Frontier:
    model, x = _subject(name)
    return rt.frontier(loss, model, x, of="temp", target="cpu", cache=directory, **({"max_compiles": 5} | options))


@pytest.mark.parametrize("name", MODELS)
def test_one_frontier_answers_ten_budgets(name: str, directory: pathlib.Path) -> None:
    found = _frontier(name, directory)
    assert len(found.best) >= 2  # control: there is something to choose
    assert found.least_bytes < 0.9 * found.plain_bytes
    model, x = _subject(name)
    for budget in np.linspace(found.least_bytes, found.plain_bytes, 10).astype(int):
        plan = found.plan(int(budget))
        own = next(point for point in found.points if point.rules == plan.rules)
        assert own.bytes <= budget
        assert not any(point.bytes <= budget and point.cycles < own.cycles for point in found.points)
        with rt.applied(model, plan.rules):  # what was promised is what the compiler says now
            measured = rt.measure(loss, model, x, target="cpu", differentiate=True, cache=directory)
        assert measured.temp_bytes == plan.measured.temp_bytes <= budget


def test_a_frontier_is_compiled_once(directory: pathlib.Path, tmp_path: pathlib.Path) -> None:
    first = _frontier("tower", directory)
    lines: list[str] = []
    again = _frontier("tower", directory, progress=lines.append)
    assert {point.rules for point in again.points} == {point.rules for point in first.points}
    assert len(lines) == 1  # the plain model, which is in the cache
    assert sum(point.measured.compile_s for point in again.points) == sum(p.measured.compile_s for p in first.points)
    _frontier("tower", tmp_path / "empty", max_compiles=3, progress=lines.append)
    assert len(lines) == 4  # control: nothing is known without the cache


def test_a_plan_begins_with_what_is_known(directory: pathlib.Path) -> None:
    known = _frontier("tower", directory)
    model, x = _subject("tower")
    plan = rt.plan(loss, model, x, budget=0.7, of="temp", target="cpu", cache=directory, time_limit_s=0.0)
    assert len(plan.points) == len(known.points)
    bare = rt.plan(loss, model, x, budget=1.0, of="temp", target="cpu", time_limit_s=0.0)
    assert len(bare.points) == 1  # control


def test_notes_of_another_program_are_left_out(directory: pathlib.Path, tmp_path: pathlib.Path) -> None:
    _frontier("tower", directory)
    (note,) = [path for path in directory.glob("plan-*.json") if path.stat().st_size > 2][:1]
    (tmp_path / note.name).write_text(note.read_text())
    other = _frontier("tower", tmp_path, max_compiles=2)
    assert len(other.points) == 2  # the notes are there, their measurements are not
    for broken in ("", "[1]", "[" * 100_000, "[\"[[remat.rule]]\\npattern = 'nowhere'\"]"):
        for path in tmp_path.glob("plan-*.json"):
            path.write_text(broken)
        assert len(_frontier("tower", tmp_path, max_compiles=2).points) == 2


def test_a_frontier_reads_budgets_as_a_plan_does(directory: pathlib.Path) -> None:
    found = _frontier("tower", directory)
    assert found.plan(0.9).budget_bytes == int(0.9 * found.plain_bytes)
    slow = max(point.cycles for point in found.best)
    assert found.plan(max_cycles=slow).measured.temp_bytes == found.least_bytes
    with pytest.raises(rt.BudgetError, match=str(found.least_bytes)):
        found.plan(found.least_bytes - 1)
    with pytest.raises(rt.BudgetError, match="neither"):
        found.plan()
    assert found.plan(np.int64(10**9)).budget_bytes == 10**9
    assert found.plan(np.float32(0.5 * found.least_bytes / found.plain_bytes + 0.5)).budget_bytes < found.plain_bytes


def test_an_error_names_the_limit_that_is_missed(directory: pathlib.Path) -> None:
    found = _frontier("tower", directory)
    quick = min(point.cycles for point in found.points)
    within = min(point.cycles for point in found.points if point.bytes <= found.least_bytes)
    assert within > quick + 1  # else nothing is asked here
    with pytest.raises(rt.BudgetError) as caught:
        found.plan(found.least_bytes, max_cycles=quick)
    assert f"max_cycles={int(within) + 1}," in caught.value.fix
    assert found.plan(found.least_bytes, max_cycles=int(within) + 1).measured.temp_bytes == found.least_bytes


def test_a_frontier_reports_temporaries_in_on_chip_memory(directory: pathlib.Path) -> None:
    found = _frontier("tower", directory)
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


def test_a_frontier_is_shown(directory: pathlib.Path, tmp_path: pathlib.Path) -> None:
    found = _frontier("tower", directory)
    assert str(found).count("\n") == len(found.points) + 1
    assert "time by model" in str(found)
    assert len(found.as_dict()["points"]) == len(found.points)
    found.plot(tmp_path / "curve.svg")
    assert "<svg" in (tmp_path / "curve.svg").read_text()
