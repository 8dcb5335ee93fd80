# SPDX-License-Identifier: Apache-2.0
"""What is state: its version with the migrations to it, and the variables that a checkpoint excludes.

Pure: no disk, no JAX. An exclusion rule names types of `nnx` variables and patterns over the names of leaves. The same
rules decide what a save does not write and what a restore neither reads nor requires.
"""

import dataclasses
import re
from collections.abc import Iterable, Sequence
from typing import Any

from remattools.errors import PatternError
from remattools.rules.paths import Pattern

from ..errors import SpecError
from .checks import require_count
from .operations import Operation
from .surgery import Surgery

RECOMPUTED = ("Cache", "Intermediate")
"""Types of variables that flax recomputes: attention caches and what `sow` collects (`Perturbation` is a subclass).

These two names mean flax's types and their subclasses, never a user's class with the same name, nor an `nnx.Param`,
which is trained.
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Exclude:
    """Exclude variables from a checkpoint, by the type of the `nnx` variable or by the name of the leaf.

    Attributes:
        types: Names of variable types; subclasses are also excluded. "Cache" and "Intermediate" are flax's types, any
            other name is that of a class. `types=()` saves variables of every type.
        paths: Patterns over names that begin with the item, such as "model.scratch"; everything below a match is also
            excluded, unless it also has a name that no pattern matches. An object with `get_state` is excluded as a
            whole or not at all.
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
                    why="a name that no type has would exclude nothing.",
                    fix=f"the name of its class: {meant!r}" if name != meant else 'types=("Cache", "Intermediate")',
                )
        for text in self.paths:
            _require_pattern(text)

    def find_reason(self, path: Sequence[str | int], types: Sequence[str] = ()) -> str:
        """Return the type or pattern that excludes a leaf; "" if the rule does not apply.

        Args:
            path: Its keys, the item first.
            types: The names of its variable's type and of that type's bases; () outside a variable.
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
            what=f"Exclude(paths=({text!r},)) contains a class.",
            why="paths are matched against names only.",
            fix='Exclude(types=("Cache",), items=("model",))',
        )
    if re.search(r"\[[^\]]*-", text):
        raise SpecError(
            what=f"Exclude(paths=({text!r},)) counts from the end.",
            why="leaves are excluded one by one, before the length of a list is known.",
            fix="count from the start, such as layers.[3:].",
        )


DEFAULT_RULES = (Exclude(),)
"""The rules of a spec without `exclude`."""


def find_exclusion(rules: Iterable[Exclude], path: Sequence[str | int], types: Sequence[str] = ()) -> str:
    """Return the type or pattern by which the first matching rule excludes a leaf; "" if no rule does."""
    return next((reason for rule in rules if (reason := rule.find_reason(path, types))), "")


def find_exclusion_of_all(
    rules: Sequence[Exclude], paths: Iterable[Sequence[str | int]], types: Sequence[str] = ()
) -> str:
    """Return what leaves out a variable that several paths lead to; "" if one of the paths is not left out."""
    reasons = [find_exclusion(rules, path, types) for path in paths]
    return reasons[0] if reasons and all(reasons) else ""


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
        what=f"CheckpointSpec(exclude={value!r:.200}) is not a rule.",
        why="exclude is an Exclude, or several in a tuple; () saves everything.",
        fix='exclude=ct.Exclude(paths=("model.scratch",))',
    )


@dataclasses.dataclass(frozen=True)
class Migration:
    """The surgery that turns a stored state of one version into one of the next.

    Attributes:
        from_version: The version before the migration; an int, at least 1.
        surgery: Operations, in order. One that matches no leaf is ignored, since runs of one version can differ.

    Example:
        >>> from ckpttools.spec.operations import Rename
        >>> len(Migration(1, Rename("encoder", "backbone")).surgery)
        1
    """

    from_version: int
    surgery: Surgery = dataclasses.field(default_factory=Surgery)

    def __init__(self, from_version: int, surgery: Surgery | Iterable[Operation] | Operation = ()) -> None:
        require_count("Migration", "from_version", from_version)
        object.__setattr__(self, "from_version", from_version)
        object.__setattr__(self, "surgery", Surgery(surgery))


@dataclasses.dataclass(frozen=True)
class StateVersion:
    """The version that every step is saved with, and how older steps are migrated to it when they are restored.

    Attributes:
        number: The version of the state as the program builds it now; increase it with every change of structure.
        migrations: One for each older version that can still be restored, without a gap up to `number`.

    Example:
        >>> StateVersion(2, (Migration(1),)).oldest
        1
    """

    number: int = 1
    migrations: tuple[Migration, ...] = ()

    def __init__(self, number: int = 1, migrations: Iterable[Migration] = ()) -> None:
        require_count("StateVersion", "number", number)
        given = tuple(migrations)
        versions = [each.from_version for each in given]
        if versions != list(range(number - len(given), number)) or (versions and versions[0] < 1):
            raise SpecError(
                what=f"StateVersion({number}) has migrations from {', '.join(map(str, versions))}.",
                why="they are applied in order, each from its version to the next, up to the last.",
                fix=f"StateVersion({number}, migrations=[ct.Migration({max(1, number - 1)}, surgery=[...])])",
            )
        object.__setattr__(self, "number", number)
        object.__setattr__(self, "migrations", given)

    @property
    def oldest(self) -> int:
        """Oldest version that can be restored."""
        return self.number - len(self.migrations)

    def get_surgery_since(self, version: int) -> tuple[Surgery, ...]:
        """Return the surgery that brings a state of `version` up to this one, in order."""
        return tuple(each.surgery for each in self.migrations if each.from_version >= version)


def as_state_version(value: "StateVersion | int") -> StateVersion:
    """Return a version that is given as a number or as a `StateVersion`."""
    return value if isinstance(value, StateVersion) else StateVersion(value)
