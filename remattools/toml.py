# SPDX-License-Identifier: Apache-2.0
"""TOML for the files of both packages: read with errors of the caller's class, written so that people can edit it.

Imports the standard library and the error base only. `tomllib` parses and cannot write; docs/dependencies.md says
why the writer here is not a library.
"""

import json
import pathlib
import re
import tomllib
from collections.abc import Iterable, Mapping
from typing import Any

from .errors import ExplainedError

_POSITION = re.compile(r"\s*\(at (?:line (\d+), column \d+|end of document)\)")
_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")


def read_text(path: pathlib.Path, *, description: str, error_type: type[ExplainedError]) -> str:
    """Return the content of a file.

    Args:
        path: The file.
        description: What it holds, for the error: "the rules".
        error_type: Class of the error to raise.

    Raises:
        ExplainedError: An `error_type`, if the file cannot be read or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise error_type(
            what=f"{path} cannot be read: {error}.",
            why=f"it should hold {description}.",
            fix="check the path, which is relative to the working directory; the file must be UTF-8.",
        ) from error


def parse_toml(text: str, *, source: str, error_type: type[ExplainedError]) -> dict[str, Any]:
    """Return the tables of a TOML document.

    Args:
        text: The document.
        source: Name of the file, for the error.
        error_type: Class of the error to raise.

    Raises:
        ExplainedError: An `error_type` with source and line, if `text` is not TOML.
    """
    try:
        return tomllib.loads(text)
    except ValueError as error:  # a TOMLDecodeError, or an integer with too many digits for Python
        position = _POSITION.search(str(error))
        line = position[1] if position else None
        if position and line is None:
            line = len(text.splitlines())
        where = source if line is None else f"{source}, line {line}"
        raise error_type(
            what=f"{where}: not TOML: {_POSITION.sub('', str(error))}.",
            why="nothing in the file was used.",
            fix='correct that line; in TOML, strings are quoted: key = "value".',
        ) from error


def format_tables(tables: Iterable[tuple[str, Mapping[str, Any]]]) -> str:
    """Return a TOML document.

    Args:
        tables: Headers as they are written, such as "[checkpoint]" or "[[remat.rule]]", each with its entries: strings,
            numbers, bools, lists and nested mappings. Nested mappings become inline tables, a list of them has one
            a line.

    Example:
        >>> print(format_tables([("[checkpoint]", {"directory": "run", "keep": [{"latest": 3}]})]), end="")
        [checkpoint]
        directory = "run"
        keep = [
            { latest = 3 },
        ]
    """
    return "\n".join(
        "\n".join([header, *(f"{_format_key(key)} = {_format_entry(value)}" for key, value in entries.items()), ""])
        for header, entries in tables
    )


def _format_entry(value: Any) -> str:
    if isinstance(value, list | tuple) and any(isinstance(item, Mapping) for item in value):
        return "\n".join(["[", *(f"    {format_value(item)}," for item in value), "]"])
    return format_value(value)


def format_value(value: Any) -> str:
    """Return a string, number, bool, sequence or mapping as TOML on one line."""
    if isinstance(value, Mapping):
        entries = ", ".join(f"{_format_key(key)} = {format_value(item)}" for key, item in value.items())
        return f"{{ {entries} }}" if entries else "{}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(format_value, value))}]"
    if isinstance(value, str):
        return _format_string(value)
    return str(value).lower() if isinstance(value, bool) else repr(value)


def _format_key(key: str) -> str:
    return key if _BARE_KEY.fullmatch(key) else _format_string(key)


def _format_string(value: str) -> str:
    # JSON's escapes are also TOML's, except that TOML has to escape DEL and has no lone surrogates.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
