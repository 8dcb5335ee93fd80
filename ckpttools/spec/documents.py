# SPDX-License-Identifier: Apache-2.0
"""Files that hold a spec or surgery, as text and as TOML; what is wrong with them is said in one way."""

import pathlib
import tomllib
from typing import Any

from ..errors import SpecFileError


def read_text(path: pathlib.Path, *, description: str) -> str:
    """The text of a file.

    Args:
        path: The file.
        description: What stands in it, for the error: "the spec of the run".

    Raises:
        SpecFileError: If it cannot be read, or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SpecFileError(
            what=f"{path} cannot be read: {error}.",
            why=f"{description} stands in it.",
            fix="check the path; the file is UTF-8 text.",
        ) from error


def read_toml(text: str, *, source: str) -> dict[str, Any]:
    """The tables of a TOML text; `source` is named in errors.

    Raises:
        SpecFileError: If it is not TOML; tomllib names the line.
    """
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise SpecFileError(
            what=f"{source} is not TOML: {error}.",
            why="nothing of it was used.",
            fix="the line that is named, as TOML has it: texts in quotes, tables in [brackets].",
        ) from error
