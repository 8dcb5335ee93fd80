# SPDX-License-Identifier: Apache-2.0
"""A whole program cut along one axis: which factor each of its equations takes, and how a piece of it is computed.

The axis starts from some values and goes through every equation that touches a value that has it, in both directions;
all other values are whole. There is one factor for each equation or the program cannot be cut.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import jax.numpy as jnp
from jax.extend import core

from ... import compat
from .. import jaxprs
from .factor import Factor, Piece

# Where a value has the axis; "sum" if the pieces' values have to be added, None if the value is whole.
type Place = int | Literal["sum"] | None
type FindFactors = Callable[[Any], Sequence[Factor]]
type RunPiece = Callable[[Any, Factor, Sequence[Any], Piece], list[Any]]

# What commutes with adding the pieces, if all operands that are not whole have to be added.
_LINEAR = frozenset(
    {
        "broadcast_in_dim",
        "convert_element_type",
        "copy",
        "neg",
        "reduce_sum",
        "reshape",
        "rev",
        "slice",
        "squeeze",
        "transpose",
    }
)
_LINEAR_IN_ALL = frozenset(["add", "add_any", "sub"])
_LINEAR_IN_EACH = frozenset(["dot_general", "mul"])


@dataclasses.dataclass(frozen=True)
class Program:
    """A jaxpr without calls of `jax.jit`.

    Attributes:
        equations: Its equations; those of inlined jits have the names of the call before their own.
        inputs: Its arguments.
        outputs: Its results, variables or literals.
        consts: Values of its constants.
    """

    equations: tuple[Any, ...]
    inputs: tuple[Any, ...]
    outputs: tuple[Any, ...]
    consts: Mapping[Any, Any]


@dataclasses.dataclass(frozen=True)
class Cut:
    """How a program is cut.

    Attributes:
        factors: Factors by the number of the equation; equations without one are computed whole in each piece.
        places: Where values have the axis; values that are missing are whole.
    """

    factors: Mapping[int, Factor]
    places: Mapping[Any, Place]

    def get_place(self, atom: Any) -> Place:
        """Return where a variable or literal has the axis."""
        return self.places.get(atom) if isinstance(atom, core.Var) else None


def flatten_program(jaxpr: Any, consts: Sequence[Any] | None = None) -> Program:
    """Return a jaxpr with the equations of its jits in place of the calls.

    Args:
        jaxpr: The jaxpr, open or closed.
        consts: Values of its constants; None to take those of a closed jaxpr.
    """
    opened = jaxprs.open_jaxpr(jaxpr)
    known = dict(zip(opened.constvars, jaxpr.consts if consts is None else consts, strict=True))
    inlined = jaxprs.inline_calls(opened, known)
    return Program(tuple(inlined.eqns), tuple(inlined.invars), tuple(inlined.outvars), known)


def find_cut(program: Program, seeds: Mapping[Any, int], find_factors: FindFactors) -> Cut | None:
    """Return how a program is cut if some of its values are cut; None if it cannot be.

    Args:
        program: The program.
        seeds: Positions of the axis in some variables, such as its results.
        find_factors: Returns the factors of an equation.
    """
    touching: dict[Any, list[int]] = {}
    for number, equation in enumerate(program.equations):
        for atom in jaxprs.collect_variables([*equation.invars, *equation.outvars]):
            touching.setdefault(atom, []).append(number)
    axes, factors, todo = dict(seeds), dict[int, Factor](), list(seeds)
    while todo:
        for number in touching.get(todo.pop(), ()):
            if number in factors:
                continue
            factor = _choose_factor(program.equations[number], axes, find_factors)
            if factor is None:
                return None
            factors[number] = factor
            for atom, axis in _pair_atoms(program.equations[number], factor):
                if axis is not None and isinstance(atom, core.Var) and atom not in axes:
                    axes[atom] = axis
                    todo.append(atom)
    if not axes.keys().isdisjoint(program.consts):
        return None
    return _verify(program, factors, axes)


def _pair_atoms(equation: Any, factor: Factor) -> Iterator[tuple[Any, int | None]]:
    yield from zip(equation.invars, factor.operands, strict=True)
    yield from zip(equation.outvars, factor.results, strict=True)


def _choose_factor(equation: Any, axes: Mapping[Any, int], find_factors: FindFactors) -> Factor | None:
    """Return the factor that agrees with the values whose axis is known. A value that is read twice has one axis."""
    for factor in find_factors(equation):
        places: dict[Any, int | None] = {}
        if all(
            axes.get(atom, axis) == axis and places.setdefault(atom, axis) == axis
            for atom, axis in _pair_atoms(equation, factor)
            if isinstance(atom, core.Var)
        ):
            return factor
    return None


def _verify(program: Program, factors: Mapping[int, Factor], axes: Mapping[Any, int]) -> Cut | None:
    """Return the places of all values in the order of the program, if each equation gets what its factor says."""
    places: dict[Any, Place] = {var: axes[var] for var in program.inputs if var in axes}
    for number, equation in enumerate(program.equations):
        operands = [places.get(atom) if isinstance(atom, core.Var) else None for atom in equation.invars]
        factor = factors.get(number)
        if factor is None:
            place = _place_whole(equation, operands)
            if place == "refused":
                return None
            results: Sequence[Place] = [place] * len(equation.outvars)
        elif tuple(operands) != factor.operands:
            return None
        else:
            results = factor.results if factor.kind == "map" else ["sum"] * len(equation.outvars)
        for var, found in zip(equation.outvars, results, strict=True):
            if axes.get(var) is not None and axes[var] != found:
                return None
            if found is not None:
                places[var] = found
    return Cut(factors, places)


def _place_whole(equation: Any, operands: Sequence[Place]) -> Literal["sum", "refused"] | None:
    """Return the place of the results of an equation without a factor, or "refused"."""
    if any(isinstance(place, int) for place in operands):
        return "refused"
    count = operands.count("sum")
    if count == 0:
        return None
    name = equation.primitive.name
    is_linear = (
        (name in _LINEAR and len(operands) == 1 and _is_inexact(equation.outvars[0]))
        or (name in _LINEAR_IN_ALL and count == len(operands))
        or (name in _LINEAR_IN_EACH and count == 1)
        or (name == "div" and operands[0] == "sum" and count == 1)
    )
    return "sum" if is_linear and not equation.effects else "refused"


def _is_inexact(atom: Any) -> bool:
    return bool(jnp.issubdtype(atom.aval.dtype, jnp.inexact))


def run_cut(
    program: Program,
    cut: Cut,
    arguments: Sequence[Any],
    piece: Piece,
    run_piece: RunPiece,
) -> list[Any]:
    """Compute one piece of a program.

    Args:
        program: The program.
        cut: How it is cut, from `find_cut`.
        arguments: Its arguments, those that have the axis already cut.
        piece: Which rows are computed.
        run_piece: Computes a piece of an equation.

    Returns:
        The results: rows, parts of a sum, or whole values, by their places.
    """
    values = {**program.consts, **dict(zip(program.inputs, arguments, strict=True))}
    for number, equation in enumerate(program.equations):
        operands = [jaxprs.read_atom(atom, values) for atom in equation.invars]
        factor = cut.factors.get(number)
        if factor is None:
            results = compat.bind(equation, operands, equation.params)
        else:
            results = run_piece(equation, factor, operands, piece)
        values.update(zip(equation.outvars, results, strict=True))
    return [jaxprs.read_atom(atom, values) for atom in program.outputs]
