# SPDX-License-Identifier: Apache-2.0
"""The best that any choice could reach on the planner's own model: one integer program over all blocks.

Every block chooses for itself, which names it keeps or no region at all; the search
under test knows few levels and at most two of them at once. Memory is counted moment by
moment as the planner counts it, recomputed values included.
"""

import collections
from typing import Any

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from remattools.plan.outline import Outline
from remattools.plan.solve import BlockProblem

_UNIT = 2.0**20


class Program:
    """A mixed-integer program that is built up row by row."""

    def __init__(self) -> None:
        self.costs: list[float] = []
        self.whole: list[int] = []
        self.tops: list[float] = []
        self.rows: list[dict[int, float]] = []
        self.lower: list[float] = []

    def column(self, *, cost: float = 0.0, whole: bool = False, top: float = 1.0) -> int:
        self.costs.append(cost)
        self.whole.append(int(whole))
        self.tops.append(top)
        return len(self.costs) - 1

    def at_least(self, terms: Any, bound: float) -> None:
        row: dict[int, float] = collections.defaultdict(float)
        for column, factor in terms:
            row[column] += factor
        self.rows.append(row)
        self.lower.append(bound)

    def bound(self, seconds: float) -> float:
        """A proved lower bound of the least cost; infinite if nothing is feasible."""
        numbers = [n for n, row in enumerate(self.rows) for _ in row]
        columns = [column for row in self.rows for column in row]
        factors = [factor for row in self.rows for factor in row.values()]
        matrix = csr_array((factors, (numbers, columns)), shape=(len(self.rows), len(self.costs)))
        scale = max(*self.costs, 1.0)
        found = milp(
            np.array(self.costs) / scale,
            constraints=LinearConstraint(matrix, lb=self.lower),
            integrality=self.whole,
            bounds=Bounds(0, self.tops),
            options={"time_limit": seconds, "mip_rel_gap": 1e-3},
        )
        if found.status == 2:
            return np.inf
        return float(found.mip_dual_bound) * scale


def least_cycles(shape: Outline, budget: float, seconds: float = 20.0) -> float:
    """A lower bound of the recomputation cycles of all choices that the model sees within the budget."""
    program = Program()
    visits = [_block(program, shape.problems[kind]) for _, kind in shape.visits]
    base, kept, runs = shape.timetable()
    for fixed, keeps, running in zip(base, kept, runs, strict=True):
        terms = [
            (column, -factor)
            for (keep, forward, backward), keeping, state in zip(visits, keeps, running, strict=True)
            for column, factor in (
                *((keep,) if keeping else ()),
                *((forward,) if state == 1 else ()),
                *((backward,) if state == 2 else ()),
            )
        ]
        program.at_least(terms, (fixed - budget) / _UNIT)
    return program.bound(seconds)


def _block(program: Program, problem: BlockProblem) -> tuple[tuple[int, float], ...]:
    """Columns of what one block keeps, and of the most that its passes need, in mebibytes."""
    graph, plain = problem.graph, problem.plain
    free = program.column(whole=True)  # no region
    names = {name: program.column(whole=True) for name in problem.names}
    run = {number: program.column(cost=problem.costs[number]) for number in problem.steps}
    sizes = [size / _UNIT for size in graph.bytes]
    by_value = {value: names[name] for name, values in problem.names.items() for value in values}
    top = sum(sizes) + 1.0
    kept, forward, backward = (program.column(top=top) for _ in range(3))
    stored = [(by_value[value], -sizes[value]) for value in by_value]
    program.at_least([(kept, 1.0), *stored, (free, -plain.kept_bytes / _UNIT)], 0.0)
    for column, size in ((forward, plain.forward_bytes), (backward, plain.backward_bytes)):
        program.at_least([(column, 1.0), (free, -size / _UNIT)], 0.0)

    for value in graph.needed:
        columns = [(by_value[value], 1.0)] if value in by_value else []
        program.at_least([*columns, (run[graph.makers[value]], 1.0), (free, 1.0)], 1.0)
    for number in problem.steps:
        for value in graph.forward[number].reads:
            if value in graph.makers:
                columns = [(by_value[value], 1.0)] if value in by_value else []
                program.at_least([*columns, (run[graph.makers[value]], 1.0), (run[number], -1.0)], 0.0)

    uncounted = graph.fused | graph.inputs | graph.outputs
    _forward_rows(program, graph, sizes, by_value, uncounted, forward, free, top)
    _backward_rows(program, problem, sizes, by_value, uncounted, run, backward, free, top)
    return (kept, 1.0), (forward, 1.0), (backward, 1.0)


def _forward_rows(
    program: Program, graph: Any, sizes: Any, by_value: Any, uncounted: Any, forward: int, free: int, top: float
) -> None:
    last = {value: number for number, step in enumerate(graph.forward) for value in (*step.writes, *step.reads)}
    for number in range(len(graph.forward)):
        fixed, terms = 0.0, []
        for value, maker in graph.makers.items():
            if value in uncounted or maker > number:
                continue
            if last[value] >= number:
                fixed += sizes[value]
            elif value in by_value:
                terms.append((by_value[value], -sizes[value]))
        program.at_least([(forward, 1.0), (free, top), *terms], fixed)


def _backward_rows(
    program: Program,
    problem: BlockProblem,
    sizes: Any,
    by_value: Any,
    uncounted: Any,
    run: dict[int, int],
    backward: int,
    free: int,
    top: float,
) -> None:
    graph, steps = problem.graph, problem.steps
    reads_back: dict[int, int] = {}
    for number, step in enumerate(graph.backward):
        reads_back.update((value, number) for value in step.reads)
    readers: dict[int, list[int]] = collections.defaultdict(list)
    for number in steps:
        for value in graph.forward[number].reads:
            readers[value].append(number)
    values = [value for number in steps for value in graph.forward[number].writes]
    values += [value for value in by_value if value not in values]
    for now in steps:  # while values are made again
        terms = []
        for value in values:
            maker, keep = graph.makers[value], by_value.get(value)
            here = program.column()
            later = [reader for reader in readers[value] if reader >= now]
            made = value not in uncounted and maker <= now and maker in run
            if keep is not None:  # kept values wait from the start
                if value in reads_back:
                    program.at_least([(here, 1.0), (keep, -1.0)], 0.0)
                for reader in later:
                    program.at_least([(here, 1.0), (keep, -1.0), (run[reader], -1.0)], -1.0)
            if made:
                unkept = [] if keep is None else [(keep, 1.0)]
                if value in reads_back or maker == now:
                    program.at_least([(here, 1.0), (run[maker], -1.0), *unkept], 0.0)
                for reader in later:
                    program.at_least([(here, 1.0), (run[maker], -1.0), (run[reader], -1.0), *unkept], -1.0)
            terms.append((here, -sizes[value]))
        # A moment counts only if its step runs.
        program.at_least([(backward, 1.0), *terms, (run[now], -top), (free, top)], -top)
    last: dict[int, int] = {}
    for number, step in enumerate(graph.backward):
        last.update((value, number) for value in (*step.writes, *step.reads))
    born = {value: number for number, step in enumerate(graph.backward) for value in step.writes}
    for now in range(len(graph.backward)):
        fixed, terms = 0.0, []
        for value, end in last.items():
            if end < now or born.get(value, 0) > now:
                continue
            if value in born or value in graph.makers:
                if value not in uncounted:
                    fixed += sizes[value]
                elif value in by_value:
                    terms.append((by_value[value], -sizes[value]))
        program.at_least([(backward, 1.0), *terms, (free, top)], fixed)
