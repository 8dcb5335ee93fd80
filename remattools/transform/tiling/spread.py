# SPDX-License-Identifier: Apache-2.0
"""Spread one axis of one value through a program: which equations can be cut along it.

Sits on `program`. From a value outwards, the largest values first: the equation that computes a value and those that
read it get the factor that puts the axis where the value has it. An equation that would need two axes at once, or has
no factor for the axis, is left out; its values are needed whole.
"""

import dataclasses
import heapq
from collections.abc import Container, Sequence
from typing import Any

from ...jaxpr.axes.factor import Factor
from .program import SUM, Place, Program, count_bytes, is_variable


@dataclasses.dataclass(frozen=True)
class Spread:
    """What can be cut along one axis.

    Attributes:
        places: Axis of each variable that can be cut, or `SUM` for one that is a sum over the axis.
        factors: Factor of each equation, by its number.
    """

    places: dict[Any, Place]
    factors: dict[int, Factor]


def spread_axis(program: Program, seeds: Sequence[tuple[Any, int]], excluded: Container[int] = ()) -> Spread:
    """Return which equations can be cut if the seeds are cut.

    Args:
        program: The program.
        seeds: Variables, each with its axis.
        excluded: Numbers of equations that stay whole.
    """
    places: dict[Any, Place] = dict(seeds)
    factors: dict[int, Factor] = {}
    queue = [(-count_bytes(var), order, var) for order, (var, _) in enumerate(seeds)]
    heapq.heapify(queue)
    order = len(queue)
    while queue:
        _, _, var = heapq.heappop(queue)
        around = [program.producers[var]] if var in program.producers else []
        for number in (*around, *program.readers.get(var, ())):
            if number in factors or number in excluded:
                continue
            factor = _choose_factor(program, number, places, var)
            if factor is None:
                continue
            factors[number] = factor
            for found, place in _place_values(program.nodes[number], factor):
                if found not in places:
                    places[found] = place
                    if place != SUM:
                        heapq.heappush(queue, (-count_bytes(found), order, found))
                        order += 1
    return Spread(places, factors)


def _choose_factor(program: Program, number: int, places: dict[Any, Place], var: Any) -> Factor | None:
    """Return the factor of an equation that agrees with what is placed, and cuts `var`; None if there is none."""
    node = program.nodes[number]
    fitting: list[tuple[bool, int, int, Factor]] = []
    for factor in program.find_factors(number):
        operands = list(zip(node.invars, factor.operands, strict=True))
        cut = {atom for atom, axis in operands if axis is not None and is_variable(atom)}
        cut.update(node.outvars)
        if var in cut and _is_consistent(node, factor, places):
            whole = sum(axis is None and is_variable(atom) and atom in places for atom, axis in operands)
            fitting.append((factor.kind == "sum", whole, len(fitting), factor))
    return min(fitting)[3] if fitting else None


def _is_consistent(node: Any, factor: Factor, places: dict[Any, Place]) -> bool:
    for atom, axis in zip(node.invars, factor.operands, strict=True):
        if axis is not None and (not is_variable(atom) or places.get(atom, axis) != axis):
            return False
    placed = (SUM if factor.kind == "sum" else axis for axis in factor.results)
    return all(places.get(var, place) == place for var, place in zip(node.outvars, placed, strict=True))


def _place_values(node: Any, factor: Factor) -> list[tuple[Any, Place]]:
    atoms = [*zip(node.invars, factor.operands, strict=True)]
    results = [*zip(node.outvars, factor.results, strict=True)]
    found: list[tuple[Any, Place]] = [(atom, axis) for atom, axis in atoms if axis is not None and is_variable(atom)]
    return found + [(var, SUM if factor.kind == "sum" or axis is None else axis) for var, axis in results]
