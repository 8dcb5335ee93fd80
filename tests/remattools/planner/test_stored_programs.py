# SPDX-License-Identifier: Apache-2.0
"""The search among programs that a TPU's compiler was asked for once: every subset of the names of small blocks.

`benchmarks/remat_optimum.py` compiles them and stores their measurements in `programs.json`;
here the search is given those instead of compiling.
"""

import dataclasses
import importlib.util
import json
import pathlib
import sys
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import remattools as rt
from remattools.planner.model.outline import build_outline
from remattools.planner.model.time import get_rates
from remattools.planner.search.exploration import Exploration
from remattools.planner.search.next_compile import Posterior, find_best_point
from remattools.planner.search.space import Space
from remattools.planner.search.to_rules import write_rules

from .spaces import exploration

ROOT = pathlib.Path(__file__).parents[3]
COMPILES = 8


def _benchmark() -> Any:
    spec = importlib.util.spec_from_file_location("remat_optimum", ROOT / "benchmarks" / "remat_optimum.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look there
    spec.loader.exec_module(module)
    return module


BENCHMARK = _benchmark()
STORED: dict[str, list[Any]] = json.loads(BENCHMARK.STORED.read_text())["programs"]
CASES = BENCHMARK.cases((*BENCHMARK.CHOSEN_ON, *BENCHMARK.HELD_OUT))


class Judged:
    """A case's search space, and what the compiler said of every program in it."""

    def __init__(self, case: Any) -> None:
        model, x = BENCHMARK.abstract(case)
        self.space = Space(build_outline(BENCHMARK.loss, model, (x,), get_rates(BENCHMARK.TARGET)))
        programs = [BENCHMARK.Program(*program) for program in STORED[str(case)]]
        by_names = {None if p.names is None else frozenset(p.names): p for p in programs}
        names = [self.space.levels[a.rest][0].names for a in self.space.assignments]
        self.by_rules = {
            write_rules(self.space, a): by_names[None if kept is None else frozenset(kept)]
            for a, kept in reversed(list(zip(self.space.assignments, names, strict=True)))
        }
        self.programs = programs
        self.some = rt.measure(jnp.sin, jnp.ones(3), target="cpu")

    def measured_by(self, rules: rt.Rules) -> rt.Measurement:
        found = self.by_rules[rules]
        return dataclasses.replace(self.some, temp_bytes=found.temp_bytes, estimated_cycles=found.cycles)

    def within(self) -> tuple[int, int]:
        """At how many budgets a plan's search ends near the best of all programs, and how many there are."""
        reached = 0
        budgets = sorted({program.temp_bytes for program in self.programs})
        for budget in budgets:
            search = exploration(self.space, self.measured_by)
            search.compile_assignment(self.space.assignments.index(self.space.plain))
            limit = max(budget, 1)
            while len(search.points) < COMPILES and (number := search.propose(limit, None)) is not None:
                search.compile_assignment(number)
            best = min(program.cycles for program in self.programs if program.temp_bytes <= budget)
            found = find_best_point(search.points.values(), limit, None)
            reached += found is not None and found.cycles <= BENCHMARK.WITHIN * best
        return reached, len(budgets)


def test_every_case_is_stored() -> None:
    assert set(map(str, CASES)) == set(STORED)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_plan_is_near_the_best_of_all_programs(case: Any) -> None:
    reached, budgets = Judged(case).within()
    assert reached == budgets


def test_a_search_that_trusts_its_model_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """Control: without uncertainties many budgets are missed."""
    expected = Exploration.compute_posterior

    def certain(self: Exploration) -> Posterior:
        found = expected(self)
        return dataclasses.replace(found, bytes_std=np.zeros_like(found.bytes), cycles_std=np.zeros_like(found.cycles))

    monkeypatch.setattr(Exploration, "compute_posterior", certain)
    counts = [Judged(case).within() for case in CASES if case.block in BENCHMARK.CHOSEN_ON]
    assert sum(reached for reached, _ in counts) < 0.8 * sum(budgets for _, budgets in counts)
