# SPDX-License-Identifier: Apache-2.0
"""A list of operations as one value, in Python and as `[[surgery]]` tables of a file."""

import dataclasses
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Self

from ..errors import SpecError
from . import surgery_toml
from .operations import OPERATIONS, Operation


@dataclasses.dataclass(frozen=True)
class Surgery:
    """Operations in the order in which they are applied; a list of them is accepted wherever this is.

    Attributes:
        operations: The operations.

    Examples:
        >>> from ckpttools.spec.operations import Drop, Rename
        >>> surgery = Surgery([Rename("encoder", "backbone"), Drop("decoder")])
        >>> Surgery.from_toml(surgery.to_toml()) == surgery
        True
    """

    operations: tuple[Operation, ...] = ()

    def __init__(self, operations: Iterable[Operation] | Operation = ()) -> None:
        if isinstance(operations, str | Mapping):
            raise SpecError(
                what=f"{operations!r} is no list of operations.",
                why="surgery in text or in a file is read first.",
                fix="ct.Surgery.load(path), or ct.Surgery.from_toml(text)",
            )
        given = (operations,) if isinstance(operations, Operation) else tuple(operations)
        for each in given:
            if type(each) not in OPERATIONS.values():
                raise SpecError(
                    what=f"{each!r} is no operation of surgery.",
                    why=f"there are {', '.join(kind.__name__ for kind in OPERATIONS.values())}.",
                    fix='surgery=[ct.Rename("model.encoder", "model.backbone")]',
                )
        object.__setattr__(self, "operations", given)

    def __iter__(self) -> Iterator[Operation]:
        return iter(self.operations)

    def __len__(self) -> int:
        return len(self.operations)

    def __add__(self, other: Iterable[Operation]) -> "Surgery":
        return Surgery((*self.operations, *Surgery(other).operations))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read the `[[surgery]]` tables of a file.

        Raises:
            SpecFileError: If the file cannot be read or a value in it is wrong; the message names file and line.
        """
        return cls(surgery_toml.read_file(pathlib.Path(path)))

    @classmethod
    def from_toml(cls, text: str) -> Self:
        """Read the `[[surgery]]` tables of `text`."""
        return cls(surgery_toml.read(text, source="<text>"))

    def to_toml(self) -> str:
        """The tables that `from_toml` reads back to an equal value."""
        return surgery_toml.write(self.operations)
