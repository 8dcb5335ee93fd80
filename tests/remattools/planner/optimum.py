# SPDX-License-Identifier: Apache-2.0
"""The best that any choice could reach on the planner's own model: one integer program over all blocks.

Here every block chooses its saved names, or no region, independently; the search under test combines at most two
levels at a time. Which operations are fused, and when a value is recomputed, depends on what is saved, which a linear
program cannot express. Memory is therefore counted only at moments at which it does not depend on that, so the result
is a bound: no choice does better.
"""

import collections
from typing import Any

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from remattools.planner.model.block_ilp import BlockProblem
from remattools.planner.model.memory import build_timetable
from remattools.planner.model.outline import Outline

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
    table = build_timetable(shape.around, shape.calls)
    moments = zip(table.around_bytes, table.saved_copies, table.runs_forward, table.runs_backward, strict=True)
    for fixed, copies, runs_forward, runs_backward in moments:
        terms = [
            (column, -factor)
            for (saved, forward, backward), *live in zip(visits, copies, runs_forward, runs_backward, strict=True)
            for is_live, (column, factor) in zip(live, (saved, forward, backward), strict=True)
            if is_live
        ]
        program.at_least(terms, (fixed - budget) / _UNIT)
    return program.bound(seconds)


def _block(program: Program, problem: BlockProblem) -> tuple[tuple[int, float], ...]:
    """Columns of what one block saves, and of the most that its passes need, in MiB."""
    graph, plain = problem.graph, problem.plain_choice
    free = program.column(whole=True)  # no region
    names = {name: program.column(whole=True) for name in problem.names}
    run = {number: program.column(cost=problem.costs[number]) for number in problem.steps}
    sizes = [size / _UNIT for size in graph.bytes]
    by_value = {value: names[name] for name, values in problem.names.items() for value in values}
    top = sum(sizes) + 1.0
    kept, forward, backward = (program.column(top=top) for _ in range(3))
    stored = [(by_value[value], -sizes[value]) for value in by_value]
    program.at_least([(kept, 1.0), *stored, (free, -plain.saved_bytes / _UNIT)], 0.0)
    for column, size in ((forward, plain.forward_bytes), (backward, plain.backward_bytes)):
        program.at_least([(column, 1.0), (free, -size / _UNIT)], 0.0)

    for value in graph.residuals:
        columns = [(by_value[value], 1.0)] if value in by_value else []
        program.at_least([*columns, (run[graph.producers[value]], 1.0), (free, 1.0)], 1.0)
    for number in problem.steps:
        for value in graph.forward[number].reads:
            if value in graph.producers:
                columns = [(by_value[value], 1.0)] if value in by_value else []
                program.at_least([*columns, (run[graph.producers[value]], 1.0), (run[number], -1.0)], 0.0)

    _forward_rows(program, graph, sizes, by_value, forward, free, top)
    _backward_rows(program, problem, sizes, by_value, run, backward, free, top)
    return (kept, 1.0), (forward, 1.0), (backward, 1.0)


def _in_memory(graph: Any, order: Any) -> frozenset[int]:
    """Values that are in memory whatever is saved, as long as these steps run: no choice fuses them."""
    readers: dict[int, set[int]] = collections.defaultdict(set)
    for number, step in enumerate(order):
        for value in step.reads:
            readers[value].add(number)
    found: set[int] = set()
    roots: set[int] = set()
    for number in reversed(range(len(order))):
        step = order[number]
        for value in step.writes:
            kinds = {order[reader].work.kind for reader in readers[value]}
            several = len(readers[value] & roots) > 1
            if value in graph.inputs or value in graph.outputs:
                continue
            if step.work.kind == "elementwise":
                alone = "other" in kinds or ("matrix" in kinds and (several or not graph.fuses_products))
            elif step.work.kind == "matrix":
                alone = not graph.fuses_products or bool(kinds & {"matrix", "other"}) or several
            else:
                alone = step.work.kind != "free"
            found.update((value,) if alone else ())
        if found.intersection(step.writes) or graph.outputs.intersection(step.writes):
            roots.add(number)
        if step.work.kind not in ("free", "elementwise", "matrix"):
            roots.add(number)
    return frozenset(found)


def _forward_rows(program: Program, graph: Any, sizes: Any, by_value: Any, forward: int, free: int, top: float) -> None:
    last = {value: number for number, step in enumerate(graph.forward) for value in (*step.writes, *step.reads)}
    there = _in_memory(graph, graph.forward)
    for number in range(len(graph.forward)):
        fixed, terms = 0.0, []
        for value, maker in graph.producers.items():
            if value in graph.inputs or value in graph.outputs or maker > number:
                continue
            if last[value] >= number and value in there:
                fixed += sizes[value]
            elif value in by_value:
                terms.append((by_value[value], -sizes[value]))
        program.at_least([(forward, 1.0), (free, top), *terms], fixed)


def _backward_rows(
    program: Program,
    problem: BlockProblem,
    sizes: Any,
    by_value: Any,
    run: dict[int, int],
    backward: int,
    free: int,
    top: float,
) -> None:
    """Moments of the backward steps: a value is recomputed where it is first needed, or later."""
    graph = problem.graph
    there = _in_memory(graph, graph.backward)
    read_at: dict[int, list[int]] = collections.defaultdict(list)
    born: dict[int, int] = {}
    needed_at: dict[int, int] = {}  # the first backward step for which a forward step can have to run
    for number, step in enumerate(graph.backward):
        born.update((value, number) for value in step.writes)
        wanted = list(step.reads)
        for value in step.reads:
            read_at[value].append(number)
        while wanted:
            maker = graph.producers.get(wanted.pop())
            if maker is not None and maker not in needed_at:
                needed_at[maker] = number
                wanted += graph.forward[maker].reads
    readers = [(value, number) for number in problem.steps for value in graph.forward[number].reads]
    for now in range(len(graph.backward)):
        fixed, terms = 0.0, []
        for value, start in born.items():
            if value in there and start <= now <= max([start, *read_at[value]]):
                fixed += sizes[value]
        for value, maker in graph.producers.items():
            later = [reader for read, reader in readers if read == value and needed_at.get(reader, -1) >= now]
            keep, reads = by_value.get(value), read_at[value]
            if value in graph.inputs or value in graph.outputs:
                continue
            here = program.column()
            terms.append((here, -sizes[value]))
            if keep is not None:
                if any(read >= now for read in reads):
                    program.at_least([(here, 1.0), (keep, -1.0)], 0.0)
                for reader in later:
                    program.at_least([(here, 1.0), (keep, -1.0), (run[reader], -1.0)], -1.0)
            if maker in run and value in there and min(reads, default=now + 1) <= now <= max(reads, default=-1):
                program.at_least([(here, 1.0), (run[maker], -1.0), *([] if keep is None else [(keep, 1.0)])], 0.0)
        program.at_least([(backward, 1.0), *terms, (free, top)], fixed)
