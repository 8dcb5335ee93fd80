# SPDX-License-Identifier: Apache-2.0
"""What a region contains, read from one trace of a call without regions.

Sits on `capture` and `naming`.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax.numpy as jnp

from ..jaxpr import forward_rules, jaxprs
from ..rules.paths import NamePattern, Path
from ..rules.rule import Remat
from ..text import format_bytes
from .author_regions import AuthorRegion, find_author_regions, find_region_around
from .capture.walk import capture
from .naming import names, scopes

_CALLBACKS = ("callback", "print", "outfeed", "infeed")
_RANDOM = ("random_bits", "threefry", "rng_bit_generator", "rng_uniform")


@dataclasses.dataclass(frozen=True)
class RegionContents:
    """What one region computes.

    Attributes:
        values: Its named values, with paths relative to the region.
        warnings: Sentences on side effects inside.
        is_stacked: Whether a scan calls it, so that one module stands for many layers.
        has_activations: Whether it computes any floating-point value besides what it returns.
        around: The author's regions that it runs in.
        inside: The author's regions that it holds.
    """

    values: tuple[names.NamedValue, ...]
    warnings: tuple[str, ...]
    is_stacked: bool
    has_activations: bool
    around: tuple[AuthorRegion, ...] = ()
    inside: tuple[AuthorRegion, ...] = ()


def find_contents(jaxpr: Any, paths: Sequence[Path]) -> list[RegionContents]:
    """Return what regions at `paths` would contain, from a trace of a call of the model."""
    values = list(names.find_named_values(jaxpr, deeper=True))
    regions = find_author_regions(jaxpr)
    return [_find_region_contents(jaxpr, values, regions, path) for path in paths]


def _find_region_contents(
    jaxpr: Any, values: Sequence[names.NamedValue], regions: dict[names.Position, AuthorRegion], path: Path
) -> RegionContents:
    inside = [v for v in values if v.path[: len(path)] == path and (v.kind != "input" or v.path == path)]
    if not path:  # what a loss computes around the model has the root's path too, and is in no region
        inside = [value for value in inside if any(_is_in_module(jaxpr, position) for position in value.where)]
    counts: dict[Any, int] = {}
    relative = []
    stacked = False
    around: dict[AuthorRegion, None] = {}
    held: dict[AuthorRegion, None] = {}
    for value in inside:
        found = find_region_around(value.where[0], regions) if regions else None
        if found is not None:
            is_held = found[1].path[: len(path)] == path
            (held if is_held else around)[found[1]] = None
            value = dataclasses.replace(value, reachable=value.reachable and not is_held)
        if value.kind == "module" and value.path == path:
            stacked = any(_is_in_scan(jaxpr, position) for position in value.where)
            continue  # what the region returns is outside of it
        key = (value.kind, value.path, value.primitive)
        index = counts.get(key, 0)
        counts[key] = index + 1
        relative.append(dataclasses.replace(value, path=value.path[len(path) :], index=index))
    floating = [v for v in relative if v.kind == "op" and any(_is_floating(aval) for aval in v.avals)]
    # The last operation computes what the region returns, which is saved outside of it.
    return RegionContents(
        tuple(relative),
        tuple(_describe_effects(relative)),
        is_stacked=stacked,
        has_activations=len(floating) > 1,
        around=tuple(around),
        inside=tuple(held),
    )


def _is_in_scan(jaxpr: Any, position: names.Position) -> bool:
    *outer, _ = _find_equations(jaxpr, position)
    return any(equation.primitive.name == "scan" for equation in outer)


def _is_in_module(jaxpr: Any, position: names.Position) -> bool:
    return any(scopes.find_paths(str(e.source_info.name_stack)) for e in _find_equations(jaxpr, position))


def _find_equations(jaxpr: Any, position: names.Position) -> Iterator[Any]:
    """Yield the equation at a position after those around it, outermost first."""
    for step in position:
        number, place = (step, None) if isinstance(step, int) else step
        equation = jaxprs.open_jaxpr(jaxpr).eqns[number]
        yield equation
        if place is not None:
            is_rule = place == forward_rules.FORWARD_RULE
            jaxpr = (
                forward_rules.trace_forward_rule(equation) if is_rule else dict(jaxprs.find_subjaxprs(equation))[place]
            )


def _is_floating(aval: Any) -> bool:
    return hasattr(aval, "dtype") and jnp.issubdtype(aval.dtype, jnp.inexact)


def _describe_effects(values: Sequence[names.NamedValue]) -> list[str]:
    callbacks = _format_labels(values, _CALLBACKS)
    if not callbacks:
        return []
    return [f"calls back to Python in {callbacks}: under remat the callback runs twice, or not at all."]


def describe_random(values: Sequence[names.NamedValue], action: Remat) -> str:
    """Return a sentence on the random operations of a region under an action; "" if there is nothing to say.

    Args:
        values: The region's named values.
        action: What it saves.
    """
    if not values:  # it is not called
        return ""
    drawn = _format_labels(values, _RANDOM)
    masks = [value for value in values if value.is_dropout_mask and value.reachable]
    labels = ", ".join(dict.fromkeys(value.label for value in masks))
    size = format_bytes(sum(value.bytes for value in masks))
    if action.policy is not None and action.policy.has_dropout_masks:
        if not masks:
            return (
                f"{f'computes no mask from random numbers ({drawn})' if drawn else 'draws no random numbers'}, so "
                "dropout_masks_saveable saves nothing in it: the rule is equal to the one without that policy."
            )
        return f"draws random numbers in {drawn} once: the masks {labels} ({size}) are saved."
    if not drawn or (masks and all(_is_saved(mask, action) for mask in masks)):
        return ""
    cure = f" The policy dropout_masks_saveable saves the masks {labels} ({size}) instead." if masks else ""
    return f"draws random numbers in {drawn}: recomputed from the same key, so equal, but at a cost.{cure}"


def _is_saved(value: names.NamedValue, action: Remat) -> bool:
    patterns = map(NamePattern.parse, (*action.save, *action.offload))
    return any(one.is_match(value.kind, value.path, value.primitive, value.index) for one in patterns)


def _format_labels(values: Sequence[names.NamedValue], kinds: tuple[str, ...]) -> str:
    labels = [v.label for v in values if v.kind == "op" and any(kind in v.primitive for kind in kinds)]
    return ", ".join(dict.fromkeys(labels))


def make_structure_key(module: Any, action: Remat | None) -> Any:
    """Return a key that is equal for modules that share one trace; None for a module that shares with no other."""
    captured = capture(module)
    if captured.unshareable is not None:
        return None
    shapes = tuple((leaf.shape, leaf.dtype) for leaf in captured.leaves)
    return (action, captured.spec, shapes)
