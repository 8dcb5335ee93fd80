# SPDX-License-Identifier: Apache-2.0
"""Surgery as TOML: one `[[surgery]]` table for each operation, in order.

    [[surgery]]
    rename = "model.encoder"           # the operation and its pattern; then its other fields
    new = "model.backbone"

Nothing is imported or evaluated: a name that is not in the table of operations is an error.
"""

import dataclasses
import json
import pathlib
import re
from collections.abc import Iterable, Mapping
from typing import Any

from ..errors import SpecError, SpecFileError, suggest_names
from . import documents
from .operations import OPERATIONS, Operation

TABLE = "surgery"


def encode(operations: Iterable[Operation]) -> list[dict[str, Any]]:
    """Operations as plain data."""
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
    """Operations from plain data.

    Raises:
        SpecError: If a table is no operation.
    """
    if not isinstance(tables, list):
        raise _make_error(tables, "surgery is a list of tables.", '[[surgery]]\nrename = "a"\nnew = "b"')
    return tuple(map(_decode_table, tables))


def _decode_table(table: Any) -> Operation:
    if not isinstance(table, Mapping) or not table:
        raise _make_error(table, "each operation is a table that begins with its name.", '{ drop = "model.decoder" }')
    found = [name for name in table if name in OPERATIONS]
    if len(found) != 1:
        if found:
            raise _make_error(
                table, "a table holds one operation.", f"a [[{TABLE}]] for each of {' and '.join(found)}."
            )
        why = "each table begins with the name of its operation."
        raise _make_error(table, why, suggest_names(next(iter(table)), OPERATIONS))
    kind: type[Any] = OPERATIONS[found[0]]
    fields = {name: tuple(value) if isinstance(value, list) else value for name, value in table.items()}
    pattern = fields.pop(found[0])
    known = {field.name: field.default for field in dataclasses.fields(kind)[1:]}
    wrong = [name for name in fields if name not in known]
    if wrong:
        raise _make_error(table, f"{found[0]} has no field {wrong[0]!r}.", suggest_names(wrong[0], known))
    lacking = [name for name, value in known.items() if value is dataclasses.MISSING and name not in fields]
    if lacking:
        raise _make_error(table, f"{found[0]} needs {' and '.join(lacking)}.", f'{lacking[0]} = "..."')
    operation: Operation = kind(pattern, **fields)
    return operation


def _make_error(table: Any, why: str, fix: str) -> SpecError:
    return SpecError(what=f"{_format_literal(table)} is no operation of surgery.", why=why, fix=fix)


def read_file(path: pathlib.Path) -> tuple[Operation, ...]:
    """The operations of a file."""
    return read(documents.read_text(path, description="the surgery"), source=str(path))


def read(text: str, *, source: str) -> tuple[Operation, ...]:
    """The operations of TOML text with `[[surgery]]` tables."""
    document = documents.read_toml(text, source=source)
    tables = document.get(TABLE)
    if not isinstance(tables, list):
        raise SpecFileError(
            what=f"{source} has no [[{TABLE}]] tables.",
            why=f"each operation stands in one; the file has {', '.join(map(repr, document)) or 'nothing'}.",
            fix=f'[[{TABLE}]]\nrename = "model.encoder"\nnew = "model.backbone"',
        )
    operations = []
    head = re.compile(rf"\s*\[\[\s*{TABLE}\s*\]\]")
    lines = [number for number, line in enumerate(text.splitlines(), 1) if head.match(line)]
    for index, table in enumerate(tables):
        try:
            operations.append(_decode_table(table))
        except SpecError as error:
            # `surgery = [{...}]` in one line is legal too; then the file has to be enough.
            where = f"{source}, line {lines[index]}" if len(lines) == len(tables) else source
            raise SpecFileError(what=f"{where}: {error.what}", why=error.why, fix=error.fix) from error
    return tuple(operations)


def write(operations: Iterable[Operation]) -> str:
    """The `[[surgery]]` tables of some operations."""
    blocks = [
        "\n".join([f"[[{TABLE}]]", *(f"{key} = {_format_literal(value)}" for key, value in table.items())])
        for table in encode(operations)
    ]
    return "\n\n".join(blocks) + "\n" if blocks else f"{TABLE} = []\n"


def _format_literal(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{key} = {_format_literal(entry)}" for key, entry in value.items()) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(map(_format_literal, value)) + "]"
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)
