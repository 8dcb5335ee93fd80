# SPDX-License-Identifier: Apache-2.0
"""The rule of Pallas kernels: along an axis of the grid whose steps are independent, such as batch or heads.

A step of the grid sees the blocks that its block specs select and its place in the grid. An axis of the grid is a
factor if one step of it is one row: each block spec either ignores it or selects with it one row of one axis, and
nothing else; results do not ignore it; the kernel does not ask for its place along it; and nothing is kept between
steps, or the kernel says that they are parallel.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from ... import jaxprs
from ..factor import Axis, Factor, Piece
from ..rule import Rule

_PLACE_PRIMITIVES = frozenset({"program_id", "num_programs"})


def _find_kernel(equation: Any) -> Iterator[Factor]:
    params = equation.params
    grid = params["grid_mapping"]
    if params["input_output_aliases"] or params.get("mesh") is not None or grid.num_index_operands:
        return
    if grid.get_grid_indices is not None or len(grid.block_mappings) != len(equation.invars) + len(equation.outvars):
        return
    for axis, steps in enumerate(grid.grid):
        if not isinstance(steps, int) or not _is_independent(params, axis):
            continue
        places = [_find_place(mapping, axis, steps) for mapping in grid.block_mappings]
        operands, results = places[: grid.num_inputs], places[grid.num_inputs :]
        if "unknown" not in places and None not in results:
            yield Factor(tuple(operands), tuple(results))  # type: ignore[arg-type]


def _is_independent(params: Mapping[str, Any], axis: int) -> bool:
    """Return whether steps along an axis of the grid neither know their place nor leave something to later steps."""
    grid = params["grid_mapping"]
    if axis not in grid.vmapped_dims:  # kernels do not see those, nor count them
        visible = axis - sum(other < axis for other in grid.vmapped_dims)
        if visible in _find_places(params["jaxpr"]):
            return False
    semantics = getattr(params.get("compiler_params"), "dimension_semantics", None)
    is_parallel = semantics is not None and "parallel" in str(semantics[axis]).lower()
    return not grid.scratch_avals or is_parallel


def _find_places(jaxpr: Any) -> set[int]:
    """Return the axes of the grid along which a kernel asks for its place."""
    found: set[int] = set()
    for equation in jaxprs.open_jaxpr(jaxpr).eqns:
        if equation.primitive.name in _PLACE_PRIMITIVES:
            found.add(equation.params["axis"])
        for _, inner in jaxprs.find_subjaxprs(equation):
            found |= _find_places(inner)
    return found


def _find_place(mapping: Any, axis: int, steps: int) -> Axis | str:
    """Return the axis of an array along which a step selects a row; None if it selects nothing, "unknown" otherwise."""
    index_map = jaxprs.open_jaxpr(mapping.index_map_jaxpr)
    step = index_map.invars[axis]
    selected = [place for place, atom in enumerate(index_map.outvars) if atom is step]
    is_used = any(atom is step for equation in index_map.eqns for atom in equation.invars)
    if mapping.transforms or is_used or len(selected) > 1:
        return "unknown"
    if not selected:
        return None
    (place,) = selected
    block = mapping.block_shape[place]
    rows = 1 if block is None or type(block).__name__ == "Squeezed" else getattr(block, "block_size", block)
    is_row = rows == 1 and type(block).__name__ in ("Squeezed", "Blocked", "NoneType", "int")
    return place if is_row and mapping.array_aval.shape[place] == steps else "unknown"


def _cut_kernel(equation: Any, factor: Factor, piece: Piece) -> Mapping[str, Any]:
    params, grid = equation.params, equation.params["grid_mapping"]
    places = (*factor.operands, *factor.results)
    axis = next(axis for axis in range(len(grid.grid)) if _has_places(grid, axis, places))
    mappings = [
        dataclasses.replace(mapping, array_aval=_cut_aval(mapping.array_aval, place, piece))
        for mapping, place in zip(grid.block_mappings, places, strict=True)
    ]
    steps = (*grid.grid[:axis], piece.measure(grid.grid[axis]), *grid.grid[axis + 1 :])
    avals = [_cut_aval(aval, place, piece) for aval, place in zip(params["out_avals"], factor.results, strict=True)]
    return {
        **params,
        "grid_mapping": dataclasses.replace(grid, grid=steps, block_mappings=tuple(mappings)),
        "out_avals": tuple(avals),
        "cost_estimate": None,  # that of the whole
    }


def _has_places(grid: Any, axis: int, places: tuple[Axis, ...]) -> bool:
    steps = grid.grid[axis]
    return places == tuple(_find_place(mapping, axis, steps) for mapping in grid.block_mappings)


def _cut_aval(aval: Any, axis: Axis, piece: Piece) -> Any:
    if axis is None:
        return aval
    shape = aval.shape
    return aval.update(shape=(*shape[:axis], piece.measure(shape[axis]), *shape[axis + 1 :]))


RULES = {"pallas_call": Rule(_find_kernel, adjust=_cut_kernel)}
