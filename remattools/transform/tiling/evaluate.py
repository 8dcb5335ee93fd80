# SPDX-License-Identifier: Apache-2.0
"""Compute a traced program with its largest values in pieces.

Sits on `normal_form`, `stretches` and `run_stretch`; regions and `tile` call it.
"""

import contextlib
import dataclasses
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ... import compat
from ...jaxpr import jaxprs
from ...rules.ruleset import LOSS
from ...rules.tile import Tile
from ..naming import scopes
from .batch import make_batch_stretch
from .normal_form import normalize
from .program import Program, Stretch
from .run_stretch import run_stretch
from .stretches import Uncut, find_stretches


def tile_program(
    jaxpr: Any,
    tile: Tile,
    *,
    is_wanted: Callable[[Any], bool] | None = None,
    batch: Sequence[int] = (),
) -> tuple[Program, list[Uncut]]:
    """Return a traced program with stretches around its large values, and the large values that stay whole.

    Args:
        jaxpr: A closed jaxpr.
        tile: Number of pieces, axis, and what is kept.
        is_wanted: Which equations a stretch must hold one of; None for any.
        batch: Indices of the arguments that hold the batch, for `axis="batch"`.
    """
    program = normalize(jaxpr)
    if tile.axis == "batch":
        return make_batch_stretch(program, tile, [program.jaxpr.invars[index] for index in batch]), []
    return find_stretches(program, tile, is_wanted=is_wanted)


def run_program(program: Program, leaves: Sequence[Any], tile: Tile) -> list[Any]:
    """Evaluate a program with stretches.

    Args:
        program: From `tile_program`.
        leaves: Its flat arguments.
        tile: How gradients are added, and what is kept.
    """
    values = {**program.consts, **dict(zip(program.jaxpr.invars, leaves, strict=True))}
    for node in program.nodes:
        if isinstance(node, Stretch):
            results = run_stretch(node, values, tile)
        else:
            results = compat.bind(node, [jaxprs.read_atom(atom, values) for atom in node.invars], node.params)
        values.update(zip(node.outvars, results, strict=True))
    return [jaxprs.read_atom(atom, values) for atom in program.jaxpr.outvars]


def run_tiled(
    program: Any, leaves: Sequence[Any], tile: Tile, *, is_loss: bool = False, batch: Sequence[int] = ()
) -> list[Any]:
    """Evaluate a closed jaxpr on its flat arguments, its largest values in pieces.

    Args:
        program: The closed jaxpr.
        leaves: Its flat arguments.
        tile: How values are cut.
        is_loss: Whether stretches that lie in modules altogether stay whole.
        batch: Indices of the arguments that hold the batch, for `axis="batch"`.
    """
    is_wanted = _is_outside_modules if is_loss else None
    tiled, uncut = tile_program(program, tile, is_wanted=is_wanted, batch=batch)
    if is_loss:  # what lies in modules is not the loss's to cut
        uncut = [value for value in uncut if not _is_in_module(tiled.nodes[tiled.producers[value.var]])]
    if _recorder.found is not None:
        _recorder.found.append(TiledProgram(_recorder.path, tile, tiled, tuple(uncut)))
    return run_program(tiled, leaves, tile)


@dataclasses.dataclass(frozen=True, eq=False)
class TiledProgram:
    """A program that was cut while `record_tiles` was active.

    Attributes:
        path: Path of its module, or "@loss".
        tile: The action.
        program: The program with its stretches.
        uncut: Large values that stay whole.
    """

    path: str
    tile: Tile
    program: Program
    uncut: tuple[Uncut, ...]


class _Recorder(threading.local):
    found: list[TiledProgram] | None = None
    path = "."


_recorder = _Recorder()


@contextlib.contextmanager
def record_tiles() -> Iterator[list[TiledProgram]]:
    """Yield a list that gets every program that is cut inside the block; equal blocks share one."""
    before, _recorder.found = _recorder.found, []
    try:
        yield _recorder.found
    finally:
        _recorder.found = before


@contextlib.contextmanager
def name_program(path: str) -> Iterator[None]:
    """Say which module or function the programs that are cut inside the block belong to."""
    before = _recorder.path
    # Paths in a region are relative to it; those in a loss start at the model.
    _recorder.path = path if before in (".", LOSS) or path == LOSS else f"{before}.{path}"
    try:
        yield
    finally:
        _recorder.path = before


def _is_outside_modules(equation: Any) -> bool:
    """Whether an equation belongs to no module."""
    return not _is_in_module(equation)


def _is_in_module(node: Any) -> bool:
    return not isinstance(node, Stretch) and scopes.find_path(str(node.source_info.name_stack)) is not None
