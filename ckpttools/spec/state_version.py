# SPDX-License-Identifier: Apache-2.0
"""The version of a user's state, and the migrations from older versions to it."""

import dataclasses
from collections.abc import Iterable

from ..errors import SpecError
from .checks import require_count
from .operations import Operation
from .surgery import Surgery


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
