# SPDX-License-Identifier: Apache-2.0
"""Specs as TOML and JSON and back, from one table of the values that a spec can hold.

Each trigger and retention value is a table whose first key is its name and whose value is its first field:

    [checkpoint]
    directory = "runs/exp1"
    save = [{ every_steps = 500 }, { on_improvement = "val_loss", mode = "min" }]    # a list is `|`
    keep = [{ latest = 3 }, { best = "val_loss", mode = "min", n = 2 }]

    [checkpoint.storage]
    asynchronous = true

`&` is `{ all_of = [...] }`. Nothing is imported or evaluated: a name that is not in the tables below is an error.
`tomllib` gives no positions for values, so the line in an error is found by looking for the key again.
"""

import dataclasses
import json
import pathlib
import re
import typing
from collections.abc import Mapping
from typing import Any

from remattools import toml

from ..errors import SpecError, SpecFileError, suggest_names
from . import retention, surgery, triggers
from .mirror import Mirror
from .state import DEFAULT_RULES, Exclude, Migration, StateVersion
from .storage import Integrity, Storage

TRIGGERS: dict[str, type[Any]] = {
    "every_steps": triggers.EverySteps,
    "every_seconds": triggers.EverySeconds,
    "at_steps": triggers.AtSteps,
    "on_improvement": triggers.OnImprovement,
    "adaptive": triggers.Adaptive,
    "any_of": triggers.AnyOf,
    "all_of": triggers.AllOf,
}
RETENTIONS: dict[str, type[Any]] = {
    "latest": retention.Latest,
    "best": retention.Best,
    "every_n_steps": retention.EveryNSteps,
    "every_n_seconds": retention.EveryNSeconds,
    "pinned": retention.Pinned,
    "all": retention.All,
}
TABLE = "checkpoint"
_GROUPS = {"save": TRIGGERS, "keep": RETENTIONS}
_UNIONS: dict[str, type[Any]] = {"save": triggers.AnyOf, "keep": retention.Union}


def encode(spec: Any) -> dict[str, Any]:
    """Return the fields of a `CheckpointSpec` as plain data."""
    plain = {
        "directory": spec.directory.as_posix(),
        "save": _encode_value(spec.save, "save"),
        "keep": _encode_value(spec.keep, "keep"),
        "storage": dataclasses.asdict(spec.storage),
        "integrity": dataclasses.asdict(spec.integrity),
    }
    if spec.mirror is not None:
        plain["mirror"] = _encode_mirror(spec.mirror)
    if spec.state_version != StateVersion():
        plain["state_version"] = _encode_version(spec.state_version)
    if spec.exclude != DEFAULT_RULES:
        plain["exclude"] = [
            {name: list(value) for name, value in dataclasses.asdict(rule).items()} for rule in spec.exclude
        ]
    return plain


def _encode_version(version: StateVersion) -> Any:
    if not version.migrations:
        return version.number
    migrations = [
        {"from_version": each.from_version, "surgery": surgery.encode(each.surgery)} for each in version.migrations
    ]
    return {"number": version.number, "migrations": migrations}


def _encode_mirror(mirror: Mirror) -> dict[str, Any]:
    plain = {field.name: getattr(mirror, field.name) for field in dataclasses.fields(mirror)}
    plain["options"] = mirror.store_options
    plain["keep"] = None if mirror.keep is None else _encode_value(mirror.keep, "keep")
    return {name: value for name, value in plain.items() if value is not None}


def _encode_value(value: Any, group: str) -> Any:
    if isinstance(value, _UNIONS[group]):
        return [_encode_value(part, group) for part in value.parts]
    for name, kind in _GROUPS[group].items():
        if type(value) is kind:
            return _encode_fields(name, value, group)
    raise SpecError(
        what=f"{value!r} cannot be written to a file.",
        why="a file may only hold the values that ckpttools itself defines: reading it back runs no foreign code.",
        fix=f"one of {', '.join(kind.__name__ for kind in _GROUPS[group].values())}.",
    )


def _encode_fields(name: str, value: Any, group: str) -> dict[str, Any]:
    fields = dataclasses.fields(value)
    if not fields:
        return {name: True}
    if fields[0].name == "parts":
        return {name: [_encode_value(part, group) for part in value.parts]}
    plain = {field.name: getattr(value, field.name) for field in fields}
    plain = {key: list(entry) if isinstance(entry, tuple) else entry for key, entry in plain.items()}
    return {name: plain.pop(fields[0].name), **plain}


def decode(table: Mapping[str, Any]) -> dict[str, Any]:
    """Return keyword arguments of `CheckpointSpec` from plain data; errors name the key at fault."""
    known = ("directory", "save", "keep", "storage", "integrity", "mirror", "state_version", "exclude")
    _require_known(table, known, "the table of a spec")
    if "directory" not in table:
        raise _ValueAtKeyError(
            "directory", "the spec has no directory.", "every step is a directory below it.", 'directory = "run"'
        )
    fields: dict[str, Any] = {"directory": table["directory"]}
    for group in ("save", "keep"):
        if group in table:
            fields[group] = _decode_value(table[group], group, key=group)
    for name, kind in (("storage", Storage), ("integrity", Integrity)):
        if name in table:
            fields[name] = _build(kind, table[name], key=name)
    if "mirror" in table:
        fields["mirror"] = _decode_mirror(table["mirror"])
    if "state_version" in table:
        fields["state_version"] = _decode_version(table["state_version"])
    if "exclude" in table:
        rules = table["exclude"] if isinstance(table["exclude"], list) else [table["exclude"]]
        fields["exclude"] = tuple(_build(Exclude, rule, key="exclude") for rule in rules)
    return fields


def _decode_version(data: Any) -> Any:
    """Parse a number, or a table with the migrations that lead to it."""
    key = "state_version"
    if not isinstance(data, Mapping):
        return _construct(StateVersion, [data], {}, key)
    migrations = data.get("migrations", [])
    if not isinstance(migrations, list) or not all(isinstance(each, Mapping) for each in migrations):
        raise _ValueAtKeyError(
            "migrations", "migrations is not a list of tables.", "each is a table.", "{ from_version = 1 }"
        )
    decoded = []
    for each in migrations:
        _require_known(each, ("from_version", "surgery"), "a migration")
        operations = _construct(surgery.decode, [each.get("surgery", [])], {}, "surgery")
        decoded.append(_construct(Migration, [each.get("from_version"), operations], {}, "from_version"))
    _require_known(data, ("number", "migrations"), key)
    return _construct(StateVersion, [data.get("number", 1), decoded], {}, key)


def _decode_mirror(data: Any) -> Any:
    """Parse an address, or a table whose `keep` has the form of the run's."""
    if isinstance(data, str):
        data = {"url": data}
    if isinstance(data, Mapping) and "keep" in data:
        data = {**data, "keep": _decode_value(data["keep"], "keep", key="keep")}
    return _build(Mirror, data, key="mirror")


def _decode_value(data: Any, group: str, *, key: str) -> Any:
    if isinstance(data, list):
        parts = [_decode_value(part, group, key=key) for part in data]
        return parts[0] if len(parts) == 1 else _construct(_UNIONS[group], parts, {}, key)
    choices = _GROUPS[group]
    if not isinstance(data, Mapping) or not data:
        example = "{ every_steps = 500 }" if group == "save" else "{ latest = 3 }"
        raise _ValueAtKeyError(
            key, f"{key} = {data!r} is not a table.", "each value is a table that begins with its name.", example
        )
    names = [name for name in data if name in choices]
    if len(names) != 1:
        first = next(iter(data))
        raise _ValueAtKeyError(
            first,
            f"{first!r} is not known under {group!r}." if not names else f"{' and '.join(names)} in one table.",
            "each table holds one value; a list of tables combines them.",
            suggest_names(first, choices),
        )
    name, kind = names[0], choices[names[0]]
    rest = {field: value for field, value in data.items() if field != name}
    fields = [field.name for field in dataclasses.fields(kind)]
    _require_known(rest, fields[1:], name)
    if fields[:1] == ["parts"]:
        entries = data[name] if isinstance(data[name], list) else [data[name]]
        return _construct(kind, [_decode_value(part, group, key=name) for part in entries], {}, name)
    return _construct(kind, [data[name]] if fields else [], rest, name)


def _build(kind: type[Any], data: Any, *, key: str) -> Any:
    if not isinstance(data, Mapping):
        raise _ValueAtKeyError(key, f"{key} = {data!r} is not a table.", "its fields belong in a table.", f"[{key}]")
    _require_known(data, [field.name for field in dataclasses.fields(kind)], key)
    return _construct(kind, [], data, key)


def _construct(kind: typing.Callable[..., Any], args: list[Any], kwargs: Mapping[str, Any], key: str) -> Any:
    try:
        return kind(*args, **kwargs)
    except SpecError as error:
        # The message of the value says which field is wrong; the line of that field is the most helpful one.
        field = next((name for name in kwargs if re.search(rf"\b{name}=", error.what)), key)
        raise _ValueAtKeyError(field, error.what, error.why, error.fix) from error
    except TypeError as error:
        why = str(error).split(".__init__() ")[-1]
        raise _ValueAtKeyError(
            key, f"{key} is incomplete.", why, "its fields are listed in docs/ckpttools.md."
        ) from error


def _require_known(data: Mapping[str, Any], known_names: typing.Iterable[str], where: str) -> None:
    known_names = list(known_names)
    for name in data:
        if name not in known_names:
            raise _ValueAtKeyError(
                name,
                f"{name!r} is not known in {where}.",
                "an entry that nothing reads would silently have no effect.",
                suggest_names(name, known_names),
            )


class _ValueAtKeyError(Exception):
    """A wrong value, with the key by which its line is found."""

    def __init__(self, key: str, what: str, why: str, fix: str) -> None:
        super().__init__(what)
        self.key, self.what, self.why, self.fix = key, what, why, fix


def read_file(path: pathlib.Path) -> dict[str, Any]:
    """Return keyword arguments of `CheckpointSpec` from the `[checkpoint]` table of a file."""
    text = toml.read_text(path, description="the spec of the run", error_type=SpecFileError)
    return read(text, source=str(path))


def read(text: str, *, source: str) -> dict[str, Any]:
    """Return keyword arguments of `CheckpointSpec` from TOML text with a `[checkpoint]` table."""
    document = toml.parse_toml(text, source=source, error_type=SpecFileError)
    if not isinstance(document.get(TABLE), dict):
        raise SpecFileError(
            what=f"{source} has no [{TABLE}] table.",
            why="the spec of a run is in that table, beside the other tables of the run.",
            fix=suggest_names(TABLE, document) or f'[{TABLE}]\ndirectory = "runs/exp1"',
        )
    return _decode_table(document[TABLE], source, lambda key: _find_line(text, key))


def read_json(text: str, *, source: str) -> dict[str, Any]:
    """Return keyword arguments of `CheckpointSpec` from JSON text."""
    try:
        document = json.loads(text)
    except json.JSONDecodeError as error:
        raise SpecFileError(
            what=f"{source} is not JSON: {error}.",
            why="nothing of it was used.",
            fix="what `spec.to_json()` writes; `ckpttools.json_schema()` lets an editor check it.",
        ) from error
    if not isinstance(document, dict):
        raise SpecFileError(
            what=f"{source} does not hold a JSON object.",
            why="a spec is an object with named fields.",
            fix='{"directory": "runs/exp1"}',
        )
    return _decode_table(document, source, lambda _key: None)


def _decode_table(
    table: Mapping[str, Any], source: str, find_line: typing.Callable[[str], int | None]
) -> dict[str, Any]:
    try:
        return decode(table)
    except _ValueAtKeyError as error:
        line = find_line(error.key)
        where = f"{source}, line {line}" if line else source
        raise SpecFileError(what=f"{where}: {error.what}", why=error.why, fix=error.fix) from error


def _find_line(text: str, key: str) -> int | None:
    """Return the line, from 1, where `key` is set in the checkpoint table or one below it; else that of the table."""
    inside, table_line = False, None
    wanted = re.compile(rf"(^|[\s{{,\[.\"']){re.escape(key)}[\"']?\s*[=\].]")
    for number, line in enumerate(text.splitlines(), start=1):
        header = re.match(r"\s*\[+\s*([^\]]+?)\s*\]+", line)
        if header and "=" not in line.split("]")[0]:
            inside = header[1] == TABLE or header[1].startswith(f"{TABLE}.")
            table_line = number if header[1] == TABLE else table_line
        if inside and wanted.search(line.split("#")[0]):
            return number
    return table_line


def write(spec: Any) -> str:
    """Return the `[checkpoint]` table of a spec, defaults included."""
    data = encode(spec)
    tables = {name: data.pop(name) for name in ("storage", "integrity", "mirror") if name in data}
    for group in _GROUPS:
        # One entry per line, even if there is only one.
        data[group] = data[group] if isinstance(data[group], list) else [data[group]]
    return toml.format_tables(
        [(f"[{TABLE}]", data), *((f"[{TABLE}.{name}]", entries) for name, entries in tables.items())]
    )
