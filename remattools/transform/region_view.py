# SPDX-License-Identifier: Apache-2.0
"""Trace a model once, plainly and with names, to look at what it computes.

Sits on `capture` and `scopes`. The caller's objects are not touched: the trace
runs on a rebuilt copy, so that random counters and caches do not move, and
abstract arrays (`jax.ShapeDtypeStruct`) serve as well as real ones.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ..jaxpr import jaxprs
from ..rules.paths import Path
from ..rules.rule import Remat
from . import region
from .capture import effects
from .capture import walk as cap
from .naming import names, scopes

_CALLBACKS = ("callback", "print", "outfeed", "infeed")
_RANDOM = ("random_bits", "threefry", "rng_bit_generator", "rng_uniform")


@dataclasses.dataclass(frozen=True)
class RegionView:
    """What one region holds, seen in a plain trace.

    Attributes:
        values: Its named values, paths relative to the region.
        warnings: Side effects and random operations inside.
        is_stacked: Whether it is called by a scan, so that one module stands for many layers.
        has_activations: Whether it computes any floating value besides what it returns.
    """

    values: tuple[names.NamedValue, ...]
    warnings: tuple[str, ...]
    is_stacked: bool
    has_activations: bool


def trace(fn: Callable[..., Any], args: Sequence[Any], *, roots: Sequence[tuple[Path, int]] = (((), 0),)) -> Any:
    """The program of `fn(*args)` with module paths on its operations and no regions.

    Args:
        fn: Any function of nnx objects, arrays and statics.
        args: Its arguments; arrays may be `jax.ShapeDtypeStruct`.
        roots: For each argument that holds modules, the path its names start with and its position.
    """
    captured = cap.capture(tuple(args))

    def run_plain(leaves: list[Any]) -> list[Any]:
        rebuilt = cap.rebuild(captured.spec, leaves, [])
        # A plain object that holds no arrays is the caller's own, not a copy.
        with (
            effects.restore_objects(captured.objects),
            region.disable_regions(),
            scopes.record_paths((path, rebuilt[position]) for path, position in roots),
        ):
            out = fn(*rebuilt)
        return cap.capture(out).leaves

    return jax.make_jaxpr(run_plain)(captured.leaves)


def view_regions(jaxpr: Any, paths: Sequence[Path]) -> list[RegionView]:
    """What regions at `paths` would hold, from a trace of the whole model."""
    values = list(names.find_named_values(jaxpr))
    return [_view_region(jaxpr, values, path) for path in paths]


def _view_region(jaxpr: Any, values: Sequence[names.NamedValue], path: Path) -> RegionView:
    inside = [value for value in values if value.path[: len(path)] == path]
    counts: dict[Any, int] = {}
    relative = []
    stacked = False
    for value in inside:
        if value.kind == "module" and value.path == path:
            stacked = any(_is_in_scan(jaxpr, position) for position in value.where)
            continue  # what the region itself returns is outside of it
        key = (value.kind, value.path, value.primitive)
        index = counts.get(key, 0)
        counts[key] = index + 1
        relative.append(dataclasses.replace(value, path=value.path[len(path) :], index=index))
    floating = [v for v in relative if v.kind == "op" and any(_is_floating(aval) for aval in v.avals)]
    # The last operation computes what the region returns, and that is kept outside of it.
    return RegionView(
        tuple(relative), tuple(_describe_effects(relative)), is_stacked=stacked, has_activations=len(floating) > 1
    )


def _is_in_scan(jaxpr: Any, position: names.Position) -> bool:
    for step in position:
        if isinstance(step, int):
            return False
        number, place = step
        equation = jaxprs.open_jaxpr(jaxpr).eqns[number]
        if equation.primitive.name == "scan":
            return True
        jaxpr = dict(jaxprs.find_subjaxprs(equation))[place]
    return False


def _is_floating(aval: Any) -> bool:
    return hasattr(aval, "dtype") and jnp.issubdtype(aval.dtype, jnp.inexact)


def _describe_effects(values: Sequence[names.NamedValue]) -> list[str]:
    callbacks = _format_labels(values, _CALLBACKS)
    random = _format_labels(values, _RANDOM)
    notes = []
    if callbacks:
        notes.append(f"calls back to Python in {callbacks}: under remat it runs twice, or not at all.")
    if random:
        notes.append(f"draws random numbers in {random}: drawn again from the same key, so equal, but not for free.")
    return notes


def _format_labels(values: Sequence[names.NamedValue], kinds: tuple[str, ...]) -> str:
    labels = [v.label for v in values if v.kind == "op" and any(kind in v.primitive for kind in kinds)]
    return ", ".join(dict.fromkeys(labels))


def make_structure_key(module: Any, action: Remat | None) -> Any:
    """Equal for modules that share one trace; None for a module that shares with none."""
    captured = cap.capture(module)
    if captured.unshareable is not None:
        return None
    shapes = tuple((leaf.shape, leaf.dtype) for leaf in captured.leaves)
    return (action, captured.spec, shapes)
