# SPDX-License-Identifier: Apache-2.0
"""Find the stretches of a program: the largest values first, each along the axis that serves it best.

Sits on `border` and `spread`.
"""

import collections
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from ...jaxpr import jaxprs
from ...rules.tile import Tile
from .border import find_vanished, select_members
from .program import SUM, Place, Program, Stretch, count_bytes, is_variable
from .spread import Spread, spread_axis

# Two axes are equally good if what vanishes differs by less than this share; then the longer axis is taken.
_EQUAL = 0.1
# Values of at least this share of another are near it.
_NEAR_SHARE = 1 / 4
_VIEWS = ("transpose", "reshape", "squeeze", "broadcast_in_dim", "convert_element_type", "name", "copy")


@dataclasses.dataclass(frozen=True)
class Uncut:
    """A large value that stays whole, with the reason.

    Attributes:
        var: The variable.
        reason: A sentence.
        equation: The equation that stands in the way; None if there is none.
    """

    var: Any
    reason: str
    equation: Any = None


def find_stretches(
    program: Program,
    tile: Tile,
    *,
    is_wanted: Callable[[Any], bool] | None = None,
) -> tuple[Program, list[Uncut]]:
    """Return the program with its stretches, and the large values that stay whole.

    Args:
        program: In normal form.
        tile: Number of pieces and axis.
        is_wanted: Which equations a stretch must hold one of; None for any.
    """
    uncut: list[Uncut] = []
    floor = program.measure_floor()
    tried: set[Any] = set()
    while True:
        seed = _find_largest(program, floor, tried)
        if seed is None:
            return program, uncut
        tried.add(seed)
        if is_wanted is not None and not _has_wanted_neighbour(program, seed, is_wanted):
            continue
        found = [
            made
            for axis, length in enumerate(seed.aval.shape)
            if length > 1
            and tile.axis in (None, axis)
            and (made := _make_stretch(program, tile, seed, axis)) is not None
            and (is_wanted is None or any(is_wanted(e) for e, _ in made[0].cut_members))
        ]
        if not found:
            uncut.append(_explain_uncut(program, seed))
            continue
        stretch, members = _choose(found)
        program = program.replace_by_stretch(stretch, members)


def _has_wanted_neighbour(program: Program, seed: Any, is_wanted: Callable[[Any], bool]) -> bool:
    """Whether a wanted equation is near a value: connected by values that are not much smaller.

    A stretch seldom reaches further, and a search from each large value of a deep model would take quadratic time.
    """
    least = count_bytes(seed) * _NEAR_SHARE
    remaining, seen = [program.producers[seed]], set[int]()
    while remaining:
        number = remaining.pop()
        node = program.nodes[number]
        if number in seen or isinstance(node, Stretch):
            continue
        seen.add(number)
        if is_wanted(node):
            return True
        for var in (*jaxprs.collect_variables(node.invars), *node.outvars):
            if count_bytes(var) >= least:
                remaining += [program.producers[var]] if var in program.producers else []
                remaining += program.readers.get(var, ())
    return False


def _find_largest(program: Program, floor: int, tried: set[Any]) -> Any:
    values = [
        var
        for node in program.nodes
        if not isinstance(node, Stretch)
        for var in node.outvars
        if count_bytes(var) >= floor and var not in tried and var not in program.results and program.readers.get(var)
    ]
    return max(values, key=count_bytes, default=None)


type _Found = tuple[Stretch, frozenset[int]]


def _choose(found: Sequence[_Found]) -> _Found:
    """Return the stretch along the best axis: one that is long enough for all pieces and where most bytes vanish.

    The leading axis is mostly the batch, which is sharded or short, and pieces along heads are slower than along
    positions: of equally good axes the longest is taken, and the leading one last.
    """
    most = max(made[0].pieces for made in found)
    found = [made for made in found if made[0].pieces == most]
    saved = {id(made): sum(map(count_bytes, made[0].vanished)) for made in found}
    best = max(saved.values())
    good = [made for made in found if saved[id(made)] >= (1 - _EQUAL) * best]
    return max(good, key=lambda made: (made[0].axis > 0, made[0].size, -made[0].axis))


def _make_stretch(program: Program, tile: Tile, seed: Any, axis: int) -> _Found | None:
    size = seed.aval.shape[axis]
    pieces = tile.count_pieces(size)
    if pieces < 2:
        return None
    excluded = {number for number, node in enumerate(program.nodes) if isinstance(node, Stretch)}
    spread = spread_axis(program, [(seed, axis)], excluded)
    spread = _keep_whole_rows(program, spread, size, -(-size // pieces))
    members = select_members(program, spread, seed)
    vanished = find_vanished(program, spread, members)
    if not vanished:
        return None
    return build_stretch(program, spread, members, vanished, seed, axis, pieces), members


def _keep_whole_rows(program: Program, spread: Spread, size: int, rows: int) -> Spread:
    """Leave out equations with an axis that pieces of whole rows do not divide, such as heads times their width."""

    def is_divisible(number: int, factor: Any) -> bool:
        node = program.nodes[number]
        lengths = [
            atom.aval.shape[axis]
            for atom, axis in zip((*node.invars, *node.outvars), (*factor.operands, *factor.results), strict=True)
            if axis is not None
        ]
        return all(length * rows % size == 0 for length in lengths)

    factors = {number: factor for number, factor in spread.factors.items() if is_divisible(number, factor)}
    return Spread(spread.places, factors)


def build_stretch(
    program: Program,
    spread: Spread,
    members: frozenset[int],
    vanished: Sequence[Any],
    seed: Any,
    axis: int,
    pieces: int,
    *,
    size: int | None = None,
) -> Stretch:
    """Return the stretch of these members, with its inputs and outputs and the views it makes itself.

    Args:
        program: The program.
        spread: The factor of each member.
        members: Numbers of its equations.
        vanished: Variables that no longer exist whole.
        seed: The largest of them.
        axis: The axis of the seed.
        pieces: Number of pieces.
        size: Length of the axis, if it is not that of the seed.
    """
    order = sorted(members)
    made = {var for number in order for var in program.nodes[number].outvars}
    inputs: dict[tuple[Any, int | None], None] = {}
    for number in order:
        for atom, place in zip(program.nodes[number].invars, spread.factors[number].operands, strict=True):
            if is_variable(atom) and atom not in made:
                inputs[atom, place] = None
    outputs: list[tuple[Any, Place]] = [
        (var, SUM if place is None else place)
        for number in order
        for var, place in zip(program.nodes[number].outvars, spread.factors[number].results, strict=True)
        if var in program.results or not members.issuperset(program.readers.get(var, ()))
    ]
    views = _pull_views(program, inputs)
    return Stretch(
        size=seed.aval.shape[axis] if size is None else size,
        pieces=pieces,
        members=(*(program.nodes[number] for number in views), *(program.nodes[number] for number in order)),
        factors=(*(None for _ in views), *(spread.factors[number] for number in order)),
        inputs=tuple(inputs),
        outputs=tuple(outputs),
        vanished=tuple(vanished),
        seed=seed,
        axis=axis,
    )


def _pull_views(program: Program, inputs: dict[tuple[Any, int | None], None]) -> list[int]:
    """Make views of whole inputs part of the stretch, so that no transposed or widened copy of a weight is kept.

    Returns:
        The numbers of the equations, in the order they run; `inputs` holds what they read instead of what they compute.
    """
    views: list[int] = []
    while True:
        found = next(
            (
                (var, program.producers[var])
                for var, place in inputs
                if place is None and var in program.producers and _is_view(program, program.producers[var])
            ),
            None,
        )
        if found is None:
            return sorted(set(views))
        var, number = found
        del inputs[var, None]
        views.append(number)
        for atom in jaxprs.collect_variables(program.nodes[number].invars):
            inputs[atom, None] = None


def _is_view(program: Program, number: int) -> bool:
    node = program.nodes[number]
    return not isinstance(node, Stretch) and node.primitive.name in _VIEWS and not node.effects


def _explain_uncut(program: Program, seed: Any) -> Uncut:
    """Return why a value stays whole: the nearest operation that cannot be cut."""
    number = program.producers[seed]
    equation = program.nodes[number]
    if not program.find_factors(number):
        return Uncut(seed, f"{equation.primitive.name} has no axis along which it can be cut", equation)
    remaining, seen = collections.deque(program.readers[seed]), set[int]()
    while remaining:
        reader = remaining.popleft()
        node = program.nodes[reader]
        if reader in seen or isinstance(node, Stretch):
            continue
        if not program.find_factors(reader):
            return Uncut(seed, f"{node.primitive.name} needs it, or what is computed from it, whole", node)
        seen.add(reader)
        remaining.extend(program.find_readers(reader))
    return Uncut(seed, "what is computed from its rows is needed whole by the next operation")
