# SPDX-License-Identifier: Apache-2.0
"""Rules as TOML and back. A file is data: reading it imports and evaluates nothing.

Two forms can be read. An array of tables keeps its order under every formatter, and is
the form that is written:

    [[remat.rule]]
    pattern = "layers.*"
    policy = "nothing_saveable"

A plain table is shorter, and its rules apply in the order in which they appear:

    [remat.rules]
    "layers.*" = "nothing_saveable"
    "layers.[-1]" = false
    "attention*" = { save = ["qkv"] }
    "layers.*.attn" = { tile = { pieces = 8 } }

Other tables of the file are ignored, so that one file can describe a whole run.
"""

import dataclasses
import json
import pathlib
import re
from collections.abc import Iterable
from typing import Any

from .. import toml
from ..errors import RematError, RuleError, RuleFileError, suggest_names
from .paths import Pattern
from .policy_types import CallablePolicy, Complement, Intersection, Policy, Union
from .rule import Action, Remat
from .tile import Tile

_FIELDS = ("policy", "save", "offload", "every_n", "offset", "group", "nested", "methods", "prevent_cse", "tile")
_SAVING = ("policy", "save", "offload")
_HEADER = re.compile(r"\s*\[\[\s*remat\s*\.\s*rule\s*\]\]")


def load(path: pathlib.Path) -> list[tuple[str, Action]]:
    """Read a rule file.

    Args:
        path: The file; patterns and actions are returned in its order.

    Raises:
        RuleFileError: If the file is missing, is not TOML, or holds something that is not a rule.
    """
    return loads(toml.read_text(path, description="the rules", error_type=RuleFileError), str(path))


def loads(text: str, source: str) -> list[tuple[str, Action]]:
    """Read rules from a TOML document.

    Args:
        text: The document.
        source: Name of the file, for errors.

    Raises:
        RuleFileError: If it is not TOML, or holds something that is not a rule.
    """
    table = toml.parse_toml(text, source=source, error_type=RuleFileError).get("remat", {})
    if not isinstance(table, dict):
        line = _find_line(text, "remat")
        raise _make_error(source, line, "`remat` is not a table.", '[remat.rules]\n"layers.*" = "nothing_saveable"')
    for key in table:
        if key not in ("rule", "rules"):
            raise _make_error(
                source,
                _find_line(text, key),
                f"[remat] has no entry {key!r}.",
                suggest_names(key, ("rule", "rules")) + " [remat.rules] is a table, [[remat.rule]] an array of tables.",
            )
    return [*_parse_table(table.get("rules", {}), text, source), *_parse_array(table.get("rule", []), text, source)]


def _parse_table(table: Any, text: str, source: str) -> list[tuple[str, Action]]:
    if not isinstance(table, dict):
        line = _find_line(text, "rules")
        raise _make_error(source, line, "`rules` is not a table.", '[remat.rules]\n"layers.*" = "nothing_saveable"')
    return [_parse_rule(pattern, value, source, text) for pattern, value in table.items()]


def _parse_array(array: Any, text: str, source: str) -> list[tuple[str, Action]]:
    headers = [n for n, line in enumerate(text.splitlines(), 1) if _HEADER.match(line)]
    if not isinstance(array, list) or not all(isinstance(entry, dict) for entry in array):
        line = _find_line(text, "rule")
        raise _make_error(source, line, "`rule` is not an array of tables.", '[[remat.rule]]\npattern = "layers.*"')
    rules = []
    for number, entry in enumerate(array):
        first = headers[number] if number < len(headers) else 1
        if "pattern" not in entry:
            raise _make_error(source, first, "this rule has no pattern.", 'pattern = "layers.*"')
        fields = {key: value for key, value in entry.items() if key != "pattern"}
        if not fields:
            fix = 'policy = "nothing_saveable", or off = true'
            raise _make_error(source, first, "this rule has no action.", fix)
        rules.append(_parse_rule(entry["pattern"], fields, source, text, first))
    return rules


def _parse_rule(pattern: Any, value: Any, source: str, text: str, first: int | None = None) -> tuple[str, Action]:
    """Parse one rule; `first` is the line of its header in an array of tables."""
    try:
        action = _parse_action(value)
        Pattern.parse(pattern)
    except RematError as error:
        # Finding a line reads the whole text, so only errors pay for it.
        line = _find_line(text, pattern) if first is None else _find_line(text, "pattern", first)
        if isinstance(error, _UnknownKeyError) and first is not None:
            line = _find_line(text, error.key, first)
        raise _make_error(source, line, error.what, error.fix, error.why) from None
    return pattern, action


class _UnknownKeyError(RuleError):
    """A key that no rule has, by which its line is found."""

    key: str = ""


def _parse_action(value: Any) -> Action:
    if value is False:
        return False
    if isinstance(value, str):
        return Remat(policy=value)
    if not isinstance(value, dict):
        raise RuleError(
            what=f"{value!r} is not an action.",
            why="it does not say what to save.",
            fix='"nothing_saveable", { save = ["qkv"] }, or false.',
        )
    for key in value:
        if key not in (*_FIELDS, "off"):
            error = _UnknownKeyError(
                what=f"a rule has no entry {key!r}.",
                why="a misspelt entry would silently do nothing.",
                fix=suggest_names(key, (*_FIELDS, "pattern", "off")),
            )
            error.key = key
            raise error
    if "off" in value:
        if len(value) > 1 or value["off"] is not True:
            others = sorted(set(value) - {"off"})
            raise RuleError(
                what=f"off = {value['off']!r}"
                + (f" is combined with {', '.join(others)}." if others else " is not true."),
                why="off excludes the modules, so there is nothing else to say about them.",
                fix="off = true alone.",
            )
        return False
    if "tile" not in value:
        return Remat(**value)
    tile = _parse_tile(value["tile"])
    if any(key in value for key in _SAVING):
        return Remat(**{**value, "tile": tile})
    return Remat(**{**value, "policy": "everything_saveable", "tile": tile})


def _parse_tile(value: Any) -> Tile:
    fields = [field.name for field in dataclasses.fields(Tile) if field.name != "_"]
    if not isinstance(value, dict):
        raise RuleError(
            what=f"tile = {value!r} is not a table.", why="it says how to cut.", fix="tile = { pieces = 8 }."
        )
    for key in value:
        if key not in fields:
            raise RuleError(
                what=f"tile has no entry {key!r}.",
                why="a misspelt entry would silently do nothing.",
                fix=suggest_names(key, fields),
            )
    # A file has no null: what is not to be widened says so.
    if value.get("accumulate") == "as is":
        value = {**value, "accumulate": None}
    return Tile(**value)


def _find_line(text: str, key: str, start: int = 1) -> int:
    """Return the first line from `start` on that sets `key`; `start` if there is none."""
    spellings = {key, json.dumps(key), f"'{key}'"}
    for number, line in enumerate(text.splitlines(), 1):
        name = re.split(r"\s*=", line.strip(), maxsplit=1)[0]
        if number >= start and (name in spellings or name.strip("[] ").split(".")[-1] in spellings):
            return number
    return start


def _make_error(source: str, line: int, what: str, fix: str, why: str = "") -> RuleFileError:
    return RuleFileError(
        what=f"{source}, line {line}: {what}",
        why=why or "the model would train under other rules than the file means.",
        fix=fix,
    )


def dumps(rules: Iterable[tuple[str, Action]]) -> str:
    """Return rules as `[[remat.rule]]` tables, which `loads` reads back.

    Args:
        rules: Patterns with their actions.

    Raises:
        RuleError: If a policy is a callable, which a file cannot hold.
    """
    return toml.format_tables(("[[remat.rule]]", _encode_rule(pattern, action)) for pattern, action in rules)


def _encode_rule(pattern: str, action: Action) -> dict[str, Any]:
    if action is False:
        return {"pattern": pattern, "off": True}
    entries: dict[str, Any] = {}
    if action.policy is not None and not (action.is_tile_alone and not (action.save or action.offload)):
        _check_writable(action.policy, pattern)
        entries["policy"] = str(action.policy)
    default = Remat()
    entries |= {
        field: getattr(action, field)
        for field in _FIELDS[1:]
        if field != "tile" and getattr(action, field) != getattr(default, field)
    }
    if action.tile is not None:
        if not action.is_tile_alone and not any(key in entries for key in _SAVING):
            entries["save"] = ()  # without it, the tile would be alone
        entries["tile"] = _encode_tile(action.tile)
    # A rule needs an action, and Remat() differs from a policy that saves nothing: this entry restates a default.
    return {"pattern": pattern, **(entries or {"every_n": 1})}


def _encode_tile(tile: Tile) -> dict[str, Any]:
    fields = [field for field in dataclasses.fields(Tile) if field.name != "_"]
    entries = {f.name: getattr(tile, f.name) for f in fields if getattr(tile, f.name) != f.default}
    if tile.accumulate is None:
        entries["accumulate"] = "as is"
    return entries


def _check_writable(policy: Policy, pattern: str) -> None:
    if isinstance(policy, CallablePolicy):
        raise RuleError(
            what=f"the rule {pattern!r} has the callable {policy} as its policy.",
            why="a rule file holds data only, so a function cannot be written to one.",
            fix="a policy by name, combined by |, & and ~, or save= and offload= by names.",
        )
    parts = policy.parts if isinstance(policy, Union | Intersection) else ()
    for part in (policy.policy,) if isinstance(policy, Complement) else parts:
        _check_writable(part, pattern)
