# SPDX-License-Identifier: Apache-2.0
"""Regions that the author of a model made: `jax.checkpoint` and `nnx.remat` in the model's code.

Sits on `jaxpr` and `naming`. MaxText and MaxDiffusion, for example, rematerialise their layers themselves. Inside such
a region that region decides what is saved: a rule there frees nothing and recomputes once more.
"""

import dataclasses
from collections.abc import Iterable
from typing import Any

from ..jaxpr import jaxprs
from ..jaxpr.source_lines import abbreviate_path, find_source_line, is_library
from ..rules.paths import Path, format_path
from .naming import names, scopes

# Frames of these are not where a model calls `jax.checkpoint`.


@dataclasses.dataclass(frozen=True)
class AuthorRegion:
    """One region in a model's code.

    Attributes:
        path: Path of the module that makes it.
        location: The function that it recomputes, with its file and line, such as `layer at model.py:26`; "" if
            unknown.
        policy: Name of its policy.
    """

    path: Path
    location: str
    policy: str

    def __str__(self) -> str:
        where = f" of {self.location}" if self.location else ""
        return f"the model's own jax.checkpoint{where} (in module {format_path(self.path)}, policy {self.policy})"


def describe_region(equation: Any, path: Path) -> AuthorRegion:
    """Return what is known of a region from its equation.

    Args:
        equation: The equation of the region.
        path: Path of the module that it runs in.
    """
    primitive = equation.params.get("_prim")  # how jax_remat3 stages a region
    policy = equation.params["policy"] if primitive is None else primitive.policy
    name = "nothing_saveable" if policy is None else getattr(policy, "__name__", type(policy).__name__)
    return AuthorRegion(path, _find_location(equation), name)


def has_author_region(jaxpr: Any) -> bool:
    """Return whether a program may have regions of the model's code; those of rules are marked."""
    for equation in jaxprs.open_jaxpr(jaxpr).eqns:
        nested = [jaxprs.open_jaxpr(inner) for _, inner in jaxprs.find_subjaxprs(equation)]
        stacks = [str(inside.source_info.name_stack) for inner in nested for inside in inner.eqns]
        if jaxprs.is_region(equation) and not any(scopes.REGION in stack for stack in stacks):
            return True
        if any(map(has_author_region, nested)):
            return True
    return False


def find_author_regions(
    jaxpr: Any, prefix: names.Position = (), outer: Path = ()
) -> dict[names.Position, AuthorRegion]:
    """Return the outermost regions of a program that was traced without the regions of rules, by their positions."""
    found = {}
    for number, equation in enumerate(jaxprs.open_jaxpr(jaxpr).eqns):
        path = scopes.find_path(str(equation.source_info.name_stack))
        path = outer if path is None else path
        if jaxprs.is_region(equation):
            found[*prefix, number] = describe_region(equation, path)
            continue
        for place, inner in jaxprs.find_subjaxprs(equation):
            found.update(find_author_regions(inner, (*prefix, (number, place)), path))
    return found


def find_region_around(
    position: names.Position, regions: dict[names.Position, AuthorRegion]
) -> tuple[names.Position, AuthorRegion] | None:
    """Return the position of the region that an equation is in, and the region; None outside of all."""
    for depth, step in enumerate(position):
        start = (*position[:depth], step if isinstance(step, int) else step[0])
        if start in regions and depth + 1 < len(position):
            return start, regions[start]
    return None


def format_regions(regions: Iterable[AuthorRegion]) -> str:
    """Return a sentence part that names regions, without repetitions."""
    return ", ".join(dict.fromkeys(map(str, regions)))


def _find_location(equation: Any) -> str:
    """Return the function of a region, or else the line that calls it, wherever that is in a user's code."""
    nested = [jaxprs.open_jaxpr(inner) for _, inner in jaxprs.find_subjaxprs(equation)]
    name, _, place = str(nested[0].debug_info.func_src_info).partition(" at ")
    if place and not is_library(place):
        return f"{name} at {abbreviate_path(place)}"
    return find_source_line(equation, with_function=True)
