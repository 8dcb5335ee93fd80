# SPDX-License-Identifier: Apache-2.0
"""Rules as TOML and back. Text is data: nothing is imported or evaluated.

Two forms are read. The array keeps its order under every formatter and is the one
that is written:

    [[remat.rule]]
    pattern = "layers.*"
    policy = "nothing_saveable"

The plain table is shorter; its order is that of appearance:

    [remat.rules]
    "layers.*" = "nothing_saveable"
    "layers.[-1]" = false
    "attention*" = { save = ["qkv"] }

Other tables of the file belong to others: a run is described by one file.
"""

import json
import pathlib
import re
import tomllib
from collections.abc import Iterable
from typing import Any

from ..errors import RematError, RuleError, RuleFileError, suggest_names
from .paths import Pattern
from .policy import CallablePolicy, Complement, Intersection, Policy, Union
from .rule import Action, Remat

_FIELDS = ("policy", "save", "offload", "every_n", "offset", "group", "methods", "prevent_cse")
_HEADER = re.compile(r"\s*\[\[\s*remat\s*\.\s*rule\s*\]\]")
_POSITION = re.compile(r"\(at line (\d+), column \d+\)")


def load(path: pathlib.Path) -> list[tuple[str, Action]]:
    """Read a rule file.

    Raises:
        RuleFileError: If it is missing, no TOML, or holds no rules.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RuleFileError(
            what=f"the rule file {path} cannot be read: {error}.",
            why="without it the model would run unruled.",
            fix="check the path; it is relative to the working directory.",
        ) from None
    return loads(text, str(path))


def loads(text: str, source: str) -> list[tuple[str, Action]]:
    """Read rules from a text; `source` stands before the line in errors."""
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        found = _POSITION.search(str(error))
        line = int(found[1]) if found else len(text.splitlines())
        problem = _POSITION.sub("", str(error)).strip()
        raise _make_error(source, line, f"no TOML: {problem}.", "the line, as TOML has it.") from None
    except ValueError as error:  # a number too long for Python
        raise _make_error(source, 1, f"no TOML that Python reads: {error}.", "numbers of sensible size.") from None
    table = document.get("remat", {})
    if not isinstance(table, dict):
        raise _make_error(source, _find_line(text, "remat"), "`remat` is no table.", "[remat.rules] above the rules.")
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
        raise _make_error(
            source, _find_line(text, "rules"), "[remat.rules] is no table.", '"layers.*" = "nothing_saveable".'
        )
    return [_parse_rule(pattern, value, source, text) for pattern, value in table.items()]


def _parse_array(array: Any, text: str, source: str) -> list[tuple[str, Action]]:
    headers = [n for n, line in enumerate(text.splitlines(), 1) if _HEADER.match(line)]
    if not isinstance(array, list) or not all(isinstance(entry, dict) for entry in array):
        raise _make_error(
            source, _find_line(text, "rule"), "`rule` is no array of tables.", "[[remat.rule]] above each rule."
        )
    rules = []
    for number, entry in enumerate(array):
        first = headers[number] if number < len(headers) else 1
        if "pattern" not in entry:
            raise _make_error(source, first, "a rule without a pattern.", 'pattern = "layers.*".')
        rest = {key: value for key, value in entry.items() if key != "pattern"}
        if not rest:
            raise _make_error(source, first, "a rule without an action.", 'policy = "nothing_saveable", or off = true.')
        rules.append(_parse_rule(entry["pattern"], rest, source, text, first))
    return rules


def _parse_rule(pattern: Any, value: Any, source: str, text: str, first: int | None = None) -> tuple[str, Action]:
    """A rule; `first` is the line of its header in an array of tables."""
    try:
        action = _parse_action(value)
        Pattern.parse(pattern)
    except RematError as error:
        # Looked for only now: it reads the whole text.
        line = _find_line(text, pattern) if first is None else _find_line(text, "pattern", first)
        if isinstance(error, _UnknownKeyError) and first is not None:
            line = _find_line(text, error.key, first)
        raise _make_error(source, line, error.what, error.fix, error.why) from None
    return pattern, action


class _UnknownKeyError(RuleError):
    """A key that no rule has; carries it, so that its line can be found."""

    key: str = ""


def _parse_action(value: Any) -> Action:
    if value is False:
        return False
    if isinstance(value, str):
        return Remat(policy=value)  # type: ignore[arg-type]  # resolved when built
    if not isinstance(value, dict):
        raise RuleError(
            what=f"{value!r} is no action.",
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
            raise RuleError(
                what=f"`off` stands as {value['off']!r} beside {sorted(set(value) - {'off'}) or 'nothing'}.",
                why="off takes the module out; it cannot be combined.",
                fix="off = true alone.",
            )
        return False
    return Remat(**value)


def _find_line(text: str, key: str, start: int = 1) -> int:
    """The line on which `key` is set, from `start` on; 1 if it cannot be told."""
    quoted = {key, json.dumps(key), f"'{key}'"}
    for number, line in enumerate(text.splitlines(), 1):
        name = re.split(r"\s*=", line.strip(), maxsplit=1)[0]
        if number >= start and (name in quoted or name.strip("[] ").split(".")[-1] in quoted):
            return number
    return start


def _make_error(source: str, line: int, what: str, fix: str, why: str = "") -> RuleFileError:
    return RuleFileError(
        what=f"{source}, line {line}: {what}",
        why=why or "the rules would not be the ones that were meant.",
        fix=fix,
    )


def dumps(rules: Iterable[tuple[str, Action]]) -> str:
    """Write rules as `[[remat.rule]]` tables."""
    return "\n".join(_format_table(pattern, action) for pattern, action in rules)


def _format_table(pattern: str, action: Action) -> str:
    lines = ["[[remat.rule]]", f"pattern = {_format_string(pattern)}"]
    if action is False:
        return "\n".join([*lines, "off = true", ""])
    if action.policy is not None:
        _check_writable(action.policy, pattern)
        lines.append(f"policy = {_format_string(str(action.policy))}")
    default = Remat()
    for field in _FIELDS[1:]:
        value = getattr(action, field)
        if value != getattr(default, field):
            lines.append(f"{field} = {_format_value(value)}")
    if len(lines) == 2:
        # An explicit policy that saves nothing is another value than none; the shortest entry says none.
        lines.append("every_n = 1")
    return "\n".join([*lines, ""])


def _format_value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, tuple):
        return f"[{', '.join(map(_format_string, value))}]"
    return _format_string(value) if isinstance(value, str) else str(value)


def _format_string(value: str) -> str:
    # JSON's escapes are TOML's, but for surrogates (which no TOML may hold) and DEL.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _check_writable(policy: Policy, pattern: str) -> None:
    if isinstance(policy, CallablePolicy):
        raise RuleError(
            what=f"the rule {pattern!r} has the callable {policy} as its policy.",
            why="a function has no text, and no code is ever read from a rule file.",
            fix="a policy by name, combined by |, & and ~, or save= and offload= by names.",
        )
    parts = policy.parts if isinstance(policy, Union | Intersection) else ()
    for part in (policy.policy,) if isinstance(policy, Complement) else parts:
        _check_writable(part, pattern)
