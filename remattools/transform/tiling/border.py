# SPDX-License-Identifier: Apache-2.0
"""Choose where a stretch begins and ends: by a minimal cut of bytes.

Sits on `spread`. Among the equations that can be cut along an axis, those are chosen whose values, no longer whole, are
worth most against what the backward pass computes again. That is a closure problem ("project selection"): a value
vanishes only if the equation that computes it and all that read it are in the stretch, and the stretch is convex: no
path leaves it and comes back. A maximum flow solves it exactly (Picard, 1976).

A stretch splits the program into what runs before it, in it, and after it. What can be before and what can be after is
decided first, from where an equation is relative to the seed; then each equation has one question left: in or not.
"""

import dataclasses
from collections.abc import Iterable
from typing import Any

import numpy as np
from scipy.sparse import csr_array
from scipy.sparse.csgraph import maximum_flow

from .program import SUM, Program, count_bytes, is_variable
from .spread import Spread

# A value counts by its bytes if it has at least this share of the seed's, and else quadratically less: values that are
# small beside the largest one are the business of regions, and not worth a matrix product that is computed again. Work
# is in bytes of results.
_FULL_SHARE = 0.25
# Small ones still count enough for what costs next to nothing, such as a norm before the logits or a sum after them.
_LEAST_WORTH = 1 / 100
_WORK = {"dot_general": 0.5, "conv_general_dilated": 0.5, "ragged_dot_general": 0.5}
_LIGHT_WORK = 1 / 512
# Capacities of the flow are int32.
_RESOLUTION = 2**20


@dataclasses.dataclass(frozen=True)
class _Sides:
    """Where equations can run relative to the stretch, other than in it.

    Attributes:
        before: Those that the seed's equation, or something that depends on it, depends on.
        after: The others that depend on something that can be cut, without the seed's equation.
        later: Those of `after` that depend on the seed's equation.
    """

    before: set[int]
    after: set[int]
    later: set[int]


def select_members(program: Program, spread: Spread, seed: Any) -> frozenset[int]:
    """Return the numbers of the equations of the stretch around `seed`; empty if it cannot be in one."""
    seed_number = program.producers[seed]
    sides = _find_sides(program, seed_number, set(spread.factors))
    candidates = set(spread.factors) - _find_excluded(program, spread, seed_number, sides)
    candidates = _drop_impossible(program, candidates, seed_number, sides)
    if seed_number not in candidates:
        return frozenset()
    return _solve(program, spread, candidates, seed, sides)


def find_vanished(program: Program, spread: Spread, members: Iterable[int]) -> list[Any]:
    """Return the variables that no longer exist whole: cut, and read only inside."""
    chosen = set(members)
    return [
        var
        for number in sorted(chosen)
        for var in program.nodes[number].outvars
        if spread.places.get(var) != SUM
        and var not in program.results
        and program.readers.get(var)
        and chosen.issuperset(program.readers[var])
    ]


def _find_sides(program: Program, seed_number: int, candidates: set[int]) -> _Sides:
    later = program.find_descendants([seed_number])
    before = program.find_ancestors({seed_number, *later})
    dependent = program.find_descendants(candidates) | candidates | later
    return _Sides(before, dependent - before - {seed_number}, later)


def _find_excluded(program: Program, spread: Spread, seed_number: int, sides: _Sides) -> set[int]:
    """Return what cannot be in the stretch because a value is needed whole, or is complete only after it."""
    excluded: set[int] = set()
    whole: set[int] = set()
    for number, factor in spread.factors.items():
        operands = zip(program.nodes[number].invars, factor.operands, strict=True)
        read_whole = [atom for atom, axis in operands if axis is None and is_variable(atom)]
        needed = {program.producers[var] for var in read_whole if var in program.producers}
        is_late = not needed.isdisjoint({seed_number, *sides.later})
        if is_late or (factor.kind == "sum" and number in sides.before):
            excluded.add(number)
        else:
            whole |= needed
    return excluded | whole | program.find_ancestors(whole)


def _drop_impossible(program: Program, candidates: set[int], seed_number: int, sides: _Sides) -> set[int]:
    """Remove candidates that would put a path out of the stretch and back into it, until none is left."""
    candidates = set(candidates)
    while True:
        dependent = program.find_descendants(candidates) | candidates
        bad = set()
        for number in candidates:
            if number in sides.before:
                if any(r in sides.before and r not in candidates for r in program.find_readers(number)):
                    bad.add(number)
            elif number != seed_number:
                producers = program.find_producers(number)
                if any(p in sides.after and p in dependent and p not in candidates for p in producers):
                    bad.add(number)
        if not bad:
            return candidates
        candidates -= bad


def _solve(program: Program, spread: Spread, candidates: set[int], seed: Any, sides: _Sides) -> frozenset[int]:
    """Return the best closed set that holds the seed's equation."""
    seed_number = program.producers[seed]
    numbers = sorted(candidates)
    index = {number: place + 2 for place, number in enumerate(numbers)}  # 0 is the source, 1 the sink
    scale = _RESOLUTION / max(count_bytes(var) for number in numbers for var in program.nodes[number].outvars)
    infinite = 2**30
    edges: dict[tuple[int, int], int] = {}

    def add_edge(start: int, end: int, capacity: float) -> None:
        edges[start, end] = min(edges.get((start, end), 0) + max(int(capacity), 1), infinite)

    add_edge(0, index[seed_number], infinite)
    for number in numbers:
        node = program.nodes[number]
        add_edge(index[number], 1, _estimate_work(node) * scale)
        for required in _find_required(program, number, candidates, seed_number, sides):
            add_edge(index[number], index[required], infinite)
    values = find_vanished(program, spread, candidates)
    for place, var in enumerate(values, start=len(numbers) + 2):
        add_edge(0, place, estimate_worth(var, seed) * scale)
        for number in {program.producers[var], *program.readers[var]}:
            add_edge(place, index[number], infinite)
    size = len(numbers) + 2 + len(values)
    starts, ends = zip(*edges, strict=True)
    capacities = np.array(list(edges.values()), dtype=np.int32)
    graph = csr_array((capacities, (np.array(starts), np.array(ends))), shape=(size, size))
    graph.indices, graph.indptr = graph.indices.astype(np.int32), graph.indptr.astype(np.int32)
    reached = _find_reached(graph, maximum_flow(graph, 0, 1).flow)
    return frozenset(number for number in numbers if index[number] in reached)


def _find_required(program: Program, number: int, candidates: set[int], seed_number: int, sides: _Sides) -> list[int]:
    """Return the candidates that are in the stretch if this one is."""
    if number in sides.before:
        return [r for r in program.find_readers(number) if r in candidates and (r in sides.before or r == seed_number)]
    if number == seed_number:
        return []
    return [p for p in program.find_producers(number) if p in candidates and p in sides.after]


def estimate_worth(var: Any, seed: Any) -> float:
    """Return what it is worth, in bytes, that a variable does not exist whole."""
    share = count_bytes(var) / (_FULL_SHARE * count_bytes(seed))
    return count_bytes(var) * max(min(1.0, share * share), _LEAST_WORTH)


def _estimate_work(node: Any) -> float:
    share = _WORK.get(node.primitive.name, _LIGHT_WORK)
    return share * sum(map(count_bytes, node.outvars))


def _find_reached(graph: Any, flow: Any) -> set[int]:
    """Return the side of the source in a minimal cut."""
    residual = (graph - flow).tocsr()
    reached, remaining = {0}, [0]
    while remaining:
        row = remaining.pop()
        for place in range(residual.indptr[row], residual.indptr[row + 1]):
            end = int(residual.indices[place])
            if residual.data[place] > 0 and end not in reached:
                reached.add(end)
                remaining.append(end)
    return reached
