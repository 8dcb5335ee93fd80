# SPDX-License-Identifier: Apache-2.0
"""The base of all operations, and what their patterns and new names may be."""

import dataclasses
import re
from typing import Any

from remattools.errors import PatternError
from remattools.rules.paths import Pattern

from ...errors import SpecError

WILDCARD = re.compile(r"\*\*|\*|\{[^{}]*\}|^\[[^\]]*\]$")
"""The wildcards in one segment of a pattern."""


@dataclasses.dataclass(frozen=True)
class Operation:
    """Base of all operations; `pattern` says what it applies to."""

    pattern: str

    def __post_init__(self) -> None:
        kind = type(self).__name__
        try:
            Pattern.parse(self.pattern)
        except PatternError as error:
            raise SpecError(what=f"ct.{kind}({self.pattern!r}): {error.what}", why=error.why, fix=error.fix) from error
        if ":" in re.sub(r"\[[^\]]*\]", "", self.pattern):
            raise SpecError(
                what=f"ct.{kind}({self.pattern!r}) contains a class.",
                why="leaves on disk have names; their classes are not stored.",
                fix=f"ct.{kind}({self.pattern.partition(':')[0] or '**'!r})",
            )


def as_code(operation: Operation) -> str:
    """Return an operation as Python code: `ct.Rename("a", "b")`."""
    shown = []
    for field in dataclasses.fields(operation):
        value: Any = getattr(operation, field.name)
        if field.default is dataclasses.MISSING:
            shown.append(_quote(value))
        elif value != field.default:
            shown.append(f"{field.name}={_quote(value)}")
    return f"ct.{type(operation).__name__}({', '.join(shown)})"


def find_wildcards(pattern: str) -> list[str]:
    """Return the wildcards of a pattern, in order."""
    return [found for segment in split_segments(pattern) for found in WILDCARD.findall(segment)]


def split_segments(pattern: str) -> list[str]:
    """Split a pattern into segments; a dot inside braces does not separate."""
    return re.findall(r"(?:[^.{}]|\{[^{}]*\})+", pattern)


def _quote(value: Any) -> str:
    return f'"{value}"' if isinstance(value, str) and '"' not in value else repr(value)


def _count_wildcards(wildcards: list[str]) -> str:
    return " ".join(wildcards) or "no wildcard"


def simplify(wildcards: list[str]) -> list[str]:
    """Return wildcards with braces and slices as "*"."""
    return ["**" if each == "**" else "*" for each in wildcards]


def make_wildcard_error(operation: Operation, new: object, rule: str, old_example: str, example: str) -> SpecError:
    """Return the error for wildcards on the two sides that do not correspond."""
    kind = type(operation).__name__
    return SpecError(
        what=f"ct.{kind}({operation.pattern!r}, {new!r}) has wildcards that do not correspond.",
        why=f"{rule}; every other wildcard stands for what the wildcard at its position on the left matched.",
        fix=f'ct.{kind}("{old_example}", "{example}")',
    )


def require_new_name(operation: Operation, new: object, name: object) -> None:
    """Raise `SpecError` unless `name` is a valid new name; `new` is the field as given."""
    kind = type(operation).__name__
    pieces = name.split(".") if isinstance(name, str) else [""]
    if not all(pieces) or any(set(piece.replace("**", "")) & set("[]{}: \t\n") for piece in pieces):
        raise SpecError(
            what=f"ct.{kind}({operation.pattern!r}, {new!r}) has no valid new name.",
            why="the new name consists of segments between dots, in which only * and ** are wildcards.",
            fix=f'ct.{kind}({operation.pattern!r}, "model.new_name")',
        )
    if re.search(r"\{[^{}]*\{", operation.pattern):
        raise SpecError(
            what=f"ct.{kind}({operation.pattern!r}, {new!r}) has braces inside braces.",
            why="each pair of braces is one wildcard on the right, so they cannot be nested.",
            fix=f"use several ct.{kind}, one for each alternative.",
        )


def require_same_wildcards(operation: Operation, new: str) -> None:
    """Raise `SpecError` unless `new` is a valid name with the wildcards of the pattern, in the same order."""
    require_new_name(operation, new, new)
    old, found = find_wildcards(operation.pattern), find_wildcards(new)
    if simplify(old) != found:
        kind = type(operation).__name__
        raise SpecError(
            what=f"ct.{kind}({operation.pattern!r}, {new!r}) has {_count_wildcards(old)}, {_count_wildcards(found)}.",
            why="each * and ** on the right stands for what the wildcard at its position on the left matched.",
            fix="write the same wildcards on both sides, in the same order.",
        )


def require_joined(operation: Operation, new: str, axis: object, old_example: str, example: str) -> None:
    """Raise `SpecError` unless `new` has all wildcards of the pattern but the last, which lists the arrays."""
    require_new_name(operation, new, new)
    old = simplify(find_wildcards(operation.pattern))
    if old[:-1] != find_wildcards(new) or old[-1:] != ["*"]:
        raise make_wildcard_error(operation, new, "the last * on the left lists the arrays", old_example, example)
    require_axis(operation, axis)


def make_field_error(operation: Operation, fields: str, why: str, fix: str) -> SpecError:
    """Return the error for a field with a wrong value.

    Args:
        operation: The operation.
        fields: The fields as given, such as "axis='x'".
        why: What the field means.
        fix: The same field with a right value.
    """
    kind = type(operation).__name__
    return SpecError(
        what=f"ct.{kind}({operation.pattern!r}, {fields}) cannot be honoured.", why=why, fix=f"ct.{kind}({fix})"
    )


def require_axis(operation: Operation, axis: object) -> None:
    """Raise `SpecError` unless an axis is an int."""
    if type(axis) is not int:
        why = "an axis is an int; negative values count from the last axis."
        raise make_field_error(operation, f"axis={axis!r}", why, "..., axis=0")


def require_flag(operation: Operation, interleaved: object) -> None:
    """Raise `SpecError` unless `interleaved` is True or False."""
    if type(interleaved) is not bool:
        why = "interleaved is True or False."
        raise make_field_error(operation, f"interleaved={interleaved!r}", why, "..., interleaved=True")


def require_start(operation: Operation, start: object) -> None:
    """Raise `SpecError` unless `start` is a tuple of ints of 0 or more."""
    if not (isinstance(start, tuple) and all(type(size) is int and size >= 0 for size in start)):
        why = "start is a tuple of ints, each 0 or more: one for each axis, from the first."
        raise make_field_error(operation, f"start={start!r}", why, f"{operation.pattern!r}, start=(0, 0)")
