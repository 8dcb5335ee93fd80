# SPDX-License-Identifier: Apache-2.0
"""Surgery: operations on stored leaves as one value, in Python and as `[[surgery]]` tables of a file.

    [[surgery]]
    rename = "model.encoder"           # the operation and its pattern; then its other fields
    new = "model.backbone"

A file is data: reading it imports and evaluates nothing, and only the names in `OPERATIONS` are accepted.
"""

import dataclasses
import os
import pathlib
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Self

from remattools import toml

from ..errors import SpecError, SpecFileError, suggest_names
from .operations import OPERATIONS, Operation

TABLE = "surgery"


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
                what=f"{operations!r} is not a list of operations.",
                why="surgery in a string or a file has to be parsed first.",
                fix="ct.Surgery.load(path), or ct.Surgery.from_toml(text)",
            )
        given = (operations,) if isinstance(operations, Operation) else tuple(operations)
        for each in given:
            if type(each) not in OPERATIONS.values():
                raise SpecError(
                    what=f"{each!r} is not a surgery operation.",
                    why=f"the operations are {', '.join(kind.__name__ for kind in OPERATIONS.values())}.",
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
        """Read the `[[surgery]]` tables of a TOML file.

        Args:
            path: The file.

        Raises:
            SpecFileError: If the file cannot be read or holds a wrong value; the message names file and line.
        """
        text = toml.read_text(pathlib.Path(path), description="the surgery", error_type=SpecFileError)
        return cls(_parse(text, source=str(path)))

    @classmethod
    def from_toml(cls, text: str) -> Self:
        """Read the `[[surgery]]` tables of a TOML document.

        Args:
            text: The document.

        Raises:
            SpecFileError: If it holds a wrong value; the message names the line.
        """
        return cls(_parse(text, source="<text>"))

    def to_toml(self) -> str:
        """Return the `[[surgery]]` tables that `from_toml` reads back to an equal value."""
        # An empty array of tables can only be written as a value.
        return toml.format_tables((f"[[{TABLE}]]", table) for table in encode(self)) or f"{TABLE} = []\n"


def encode(operations: Iterable[Operation]) -> list[dict[str, Any]]:
    """Return operations as plain data, one table each."""
    tables = []
    for operation in operations:
        name = next(name for name, kind in OPERATIONS.items() if type(operation) is kind)
        table: dict[str, Any] = {name: operation.pattern}
        for field in dataclasses.fields(operation)[1:]:
            value = getattr(operation, field.name)
            if value != field.default:
                table[field.name] = list(value) if isinstance(value, tuple) else value
        tables.append(table)
    return tables


def decode(tables: Any) -> tuple[Operation, ...]:
    """Return the operations that plain data describes.

    Args:
        tables: A list of mappings, as `encode` returns.

    Raises:
        SpecError: If it is not a list of operations.
    """
    if not isinstance(tables, list):
        raise _make_error(tables, "surgery must be a list of tables.", '[[surgery]]\nrename = "a"\nnew = "b"')
    return tuple(map(_decode_table, tables))


def _decode_table(table: Any) -> Operation:
    if not isinstance(table, Mapping) or not table:
        raise _make_error(table, "each operation is a table that begins with its name.", '{ drop = "model.decoder" }')
    names = [name for name in table if name in OPERATIONS]
    if not names:
        why = "each table begins with the name of its operation."
        raise _make_error(table, why, suggest_names(next(iter(table)), OPERATIONS))
    if len(names) > 1:
        raise _make_error(table, "a table holds one operation.", f"one [[{TABLE}]] for each of {' and '.join(names)}.")
    kind: type[Any] = OPERATIONS[names[0]]
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in table.items()}
    pattern = values.pop(names[0])
    defaults = {field.name: field.default for field in dataclasses.fields(kind)[1:]}
    unknown = [name for name in values if name not in defaults]
    if unknown:
        raise _make_error(table, f"{names[0]} has no field {unknown[0]!r}.", suggest_names(unknown[0], defaults))
    missing = [name for name, value in defaults.items() if value is dataclasses.MISSING and name not in values]
    if missing:
        raise _make_error(table, f"{names[0]} needs {' and '.join(missing)}.", f'{missing[0]} = "..."')
    operation: Operation = kind(pattern, **values)
    return operation


def _make_error(table: Any, why: str, fix: str) -> SpecError:
    return SpecError(what=f"{toml.format_value(table)} is not a surgery operation.", why=why, fix=fix)


def _parse(text: str, *, source: str) -> tuple[Operation, ...]:
    document = toml.parse_toml(text, source=source, error_type=SpecFileError)
    tables = document.get(TABLE)
    if not isinstance(tables, list):
        raise SpecFileError(
            what=f"{source} has no [[{TABLE}]] tables.",
            why=f"each operation needs one; the file has {', '.join(map(repr, document)) or 'nothing'}.",
            fix=f'[[{TABLE}]]\nrename = "model.encoder"\nnew = "model.backbone"',
        )
    operations = []
    header = re.compile(rf"\s*\[\[\s*{TABLE}\s*\]\]")
    lines = [number for number, line in enumerate(text.splitlines(), 1) if header.match(line)]
    for index, table in enumerate(tables):
        try:
            operations.append(_decode_table(table))
        except SpecError as error:
            # In an inline array, `surgery = [{...}]`, the tables have no headers to find.
            where = f"{source}, line {lines[index]}" if len(lines) == len(tables) else source
            raise SpecFileError(what=f"{where}: {error.what}", why=error.why, fix=error.fix) from error
    return tuple(operations)
