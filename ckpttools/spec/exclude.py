# SPDX-License-Identifier: Apache-2.0
"""What is state: which variables a checkpoint leaves out because the program recomputes them.

Pure: no disk, no JAX. A rule names types of `nnx` variables and patterns over the names of leaves. The same rules
decide at a save what is not written, and at a restore what is neither read nor required.
"""

import dataclasses
import re
from collections.abc import Iterable, Sequence
from typing import Any

from remattools.errors import PatternError
from remattools.rules.paths import Pattern

from ..errors import SpecError

RECOMPUTED = ("Cache", "Intermediate")
"""Types of variables that flax recomputes: caches of attention, and what `sow` collects; `Perturbation` is one of them.
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Exclude:
    """Leave variables out of a checkpoint, by the type of the `nnx` variable or by the name of the leaf.

    Attributes:
        types: Names of variable types; subclasses are left out, too. `types=()` saves variables of every type.
        paths: Patterns over names that begin with the item, such as "model.scratch"; what lies below a match is left
            out, too.
        items: Names of the items that the rule applies to; () for all.

    Example:
        >>> Exclude(items=("model",)).find_reason(("model", "attention", "cached_key"), ("Cache",))
        'Cache'
        >>> Exclude(items=("model",)).find_reason(("server", "attention", "cached_key"), ("Cache",))
        ''
    """

    types: tuple[str, ...] = RECOMPUTED
    paths: tuple[str, ...] = ()
    items: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for field in ("types", "paths", "items"):
            value = getattr(self, field)
            value = tuple(value) if isinstance(value, list) else value
            if not isinstance(value, tuple) or not all(isinstance(each, str) for each in value):
                raise SpecError(
                    what=f"Exclude({field}={value!r:.80}) is not a tuple of strings.",
                    why=f"each entry of {field} is compared with a name.",
                    fix=f"Exclude({field}=({value!r:.80},))"
                    if isinstance(value, str)
                    else f'Exclude({field}=("...",))',
                )
            object.__setattr__(self, field, value)
        known = {name.lower(): name for name in RECOMPUTED}
        known |= {f"{name}s": known[name] for name in list(known)}
        for name in self.types:
            meant = known.get(name.lower(), name)
            if not name.isidentifier() or name != meant:
                raise SpecError(
                    what=f"Exclude(types={self.types!r}): {name!r} does not name a type of variables.",
                    why="a name that no type has would leave nothing out.",
                    fix=f"the name of its class: {meant!r}" if name != meant else 'types=("Cache", "Intermediate")',
                )
        for text in self.paths:
            _require_pattern(text)

    def find_reason(self, path: Sequence[str | int], types: Sequence[str] = ()) -> str:
        """Return the type or pattern that leaves a leaf out; "" if the rule does not.

        Args:
            path: Its keys, the item first.
            types: The names of its variable's type and of that type's bases; () if it is in no variable.
        """
        if self.items and path[0] not in self.items:
            return ""
        for name in types:
            if name in self.types:
                return name
        if self.paths:
            # A key that was stored is a string even if it was an index.
            keys = tuple(int(key) if str(key).isdecimal() else key for key in path)
            for text in self.paths:
                pattern = Pattern.parse(text)
                if any(pattern.is_match(keys[:depth]) for depth in range(1, len(keys) + 1)):
                    return text
        return ""


def _require_pattern(text: str) -> None:
    try:
        Pattern.parse(text)
    except PatternError as error:
        raise SpecError(what=f"Exclude(paths=({text!r},)): {error.what}", why=error.why, fix=error.fix) from error
    if ":" in re.sub(r"\[[^\]]*\]", "", text):
        raise SpecError(
            what=f"Exclude(paths=({text!r},)) asks for a class.",
            why="paths are compared with names only.",
            fix='Exclude(types=("Cache",), items=("model",))',
        )
    if re.search(r"\[[^\]]*-", text):
        raise SpecError(
            what=f"Exclude(paths=({text!r},)) counts from the end.",
            why="leaves are left out one by one, before the length of a list is known.",
            fix="count from the start, such as layers.[3:].",
        )


DEFAULT_RULES = (Exclude(),)
"""The rules of a spec that has none of its own."""


def find_exclusion(rules: Iterable[Exclude], path: Sequence[str | int], types: Sequence[str] = ()) -> str:
    """Return what leaves a leaf out, as `Exclude.find_reason` of the first rule that does; "" if none does."""
    return next((reason for rule in rules if (reason := rule.find_reason(path, types))), "")


def as_rules(value: Any) -> tuple[Exclude, ...]:
    """Return the rules of a spec, given as one rule or several.

    Raises:
        SpecError: If `value` is something else.
    """
    if isinstance(value, Exclude):
        return (value,)
    if isinstance(value, tuple | list) and all(isinstance(rule, Exclude) for rule in value):
        return tuple(value)
    raise SpecError(
        what=f"CheckpointSpec(exclude={value!r:.200}) is of the wrong kind.",
        why="exclude is an Exclude, or several in a tuple; () saves everything.",
        fix='exclude=ct.Exclude(paths=("model.scratch",))',
    )
