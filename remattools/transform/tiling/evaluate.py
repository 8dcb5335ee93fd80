# SPDX-License-Identifier: Apache-2.0
"""Compute a traced program with its largest values in pieces.

Sits on `normal_form`, `stretches` and `run_stretch`; regions and `tile` call it.
"""

from collections.abc import Callable, Sequence
from typing import Any

from ... import compat
from ...jaxpr import jaxprs
from ...rules.tile import Tile
from ..naming import scopes
from .normal_form import normalize
from .program import Program, Stretch
from .run_stretch import run_stretch
from .stretches import Uncut, find_stretches, measure_floor


def tile_program(
    jaxpr: Any, tile: Tile, *, is_wanted: Callable[[Stretch], bool] | None = None
) -> tuple[Program, list[Uncut]]:
    """Return a traced program with stretches around its large values.

    Args:
        jaxpr: An open jaxpr.
        tile: Number of pieces, axis, and what is kept.
        is_wanted: Whether a stretch that was found is kept; None to keep all.
    """
    inlined = Program(jaxpr, jaxpr.eqns)
    program = normalize(jaxpr, measure_floor(inlined))
    return find_stretches(program, tile, measure_floor(program), is_wanted=is_wanted)


def run_program(
    program: Program, consts: Sequence[Any], leaves: Sequence[Any], tile: Tile
) -> list[Any]:
    """Evaluate a program with stretches.

    Args:
        program: From `tile_program`.
        consts: Values of the jaxpr's constants.
        leaves: Its flat arguments.
        tile: How gradients are added, and what is kept.
    """
    values: dict[Any, Any] = dict(zip(program.jaxpr.constvars, consts, strict=True))
    values.update(zip(program.jaxpr.invars, leaves, strict=True))
    for node in program.nodes:
        if isinstance(node, Stretch):
            results = run_stretch(node, values, tile)
        else:
            results = compat.bind(node, [jaxprs.read_atom(atom, values) for atom in node.invars], node.params)
        values.update(zip(node.outvars, results, strict=True))
    return [jaxprs.read_atom(atom, values) for atom in program.jaxpr.outvars]


def run_tiled(program: Any, leaves: Sequence[Any], tile: Tile, *, is_loss: bool = False) -> list[Any]:
    """Evaluate a closed jaxpr on its flat arguments, its largest values in pieces.

    Args:
        program: The closed jaxpr.
        leaves: Its flat arguments.
        tile: How values are cut.
        is_loss: Whether stretches that lie in modules altogether stay whole.
    """
    is_wanted = _is_outside_modules if is_loss else None
    tiled, _ = tile_program(jaxprs.open_jaxpr(program), tile, is_wanted=is_wanted)
    return run_program(tiled, program.consts, leaves, tile)


def _is_outside_modules(stretch: Stretch) -> bool:
    """Whether a stretch holds equations that belong to no module."""
    return any(
        factor is not None and scopes.find_path(str(equation.source_info.name_stack)) is None
        for equation, factor in zip(stretch.members, stretch.factors, strict=True)
    )
