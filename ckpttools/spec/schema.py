# SPDX-License-Identifier: Apache-2.0
"""The JSON schema of a spec's file form, for editors that complete and check as one types."""

import dataclasses
import types
import typing
from typing import Any

from .mirror import Mirror
from .operations import OPERATIONS
from .spec_file import RETENTIONS, TABLE, TRIGGERS
from .state import Exclude
from .storage import Integrity, Storage

_JSON_TYPES = {int: "integer", float: "number", str: "string", bool: "boolean"}


def json_schema() -> dict[str, Any]:
    """Return the schema of a run file: an object whose `checkpoint` table is a spec.

    Example:
        >>> import ckpttools as ct
        >>> sorted(ct.json_schema()["properties"]["checkpoint"]["properties"])
        ['directory', 'exclude', 'integrity', 'keep', 'mirror', 'save', 'state_version', 'storage']
    """
    spec = {
        "type": "object",
        "additionalProperties": False,
        "required": ["directory"],
        "properties": {
            "directory": {"type": "string", "description": "The run's directory; relative to the file."},
            "save": _allow_list("trigger"),
            "keep": _allow_list("retention"),
            "storage": _make_object(Storage),
            "integrity": _make_object(Integrity),
            "mirror": {"anyOf": [{"type": "string"}, _make_mirror()]},
            "exclude": {"anyOf": [_make_object(Exclude), {"type": "array", "items": _make_object(Exclude)}]},
            "state_version": {"anyOf": [{"type": "integer", "minimum": 1}, _make_state_version()]},
        },
    }
    definitions = {
        "trigger": {"oneOf": [_make_value(name, kind, "trigger") for name, kind in TRIGGERS.items()]},
        "retention": {"oneOf": [_make_value(name, kind, "retention") for name, kind in RETENTIONS.items()]},
        "operation": {"oneOf": [_make_value(name, kind, "operation") for name, kind in OPERATIONS.items()]},
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "ckpttools run file",
        "type": "object",
        "properties": {TABLE: spec, "surgery": _make_operations()},
        "$defs": definitions,
    }


def _allow_list(definition: str) -> dict[str, Any]:
    one = {"$ref": f"#/$defs/{definition}"}
    return {"anyOf": [one, {"type": "array", "items": one, "minItems": 1}]}


def _make_object(kind: type[Any]) -> dict[str, Any]:
    hints = typing.get_type_hints(kind)
    properties = {
        field.name: {**_make_type(hints[field.name]), "default": field.default} for field in dataclasses.fields(kind)
    }
    return {"type": "object", "additionalProperties": False, "properties": properties}


def _make_mirror() -> dict[str, Any]:
    """The table of a mirror: what is not plain in it is spelled out here."""
    hints = typing.get_type_hints(Mirror)
    plain = ("url", "verify", "must_answer", "wait_s")
    properties = {name: _make_type(hints[name]) for name in plain}
    options = {"type": "object", "additionalProperties": {"type": ["string", "number", "boolean"]}}
    properties |= {"keep": _allow_list("retention"), "options": options}
    return {"type": "object", "additionalProperties": False, "properties": properties, "required": ["url"]}


def _make_operations() -> dict[str, Any]:
    return {"type": "array", "items": {"$ref": "#/$defs/operation"}}


def _make_state_version() -> dict[str, Any]:
    """The table of a version with the migrations that lead to it."""
    version = {"type": "integer", "minimum": 1}
    migration = {
        "type": "object",
        "additionalProperties": False,
        "properties": {"from_version": version, "surgery": _make_operations()},
        "required": ["from_version"],
    }
    properties = {"number": version, "migrations": {"type": "array", "items": migration}}
    return {"type": "object", "additionalProperties": False, "properties": properties, "required": ["number"]}


def _make_value(name: str, kind: type[Any], definition: str) -> dict[str, Any]:
    """The table of one trigger or retention value: its first field stands under its name."""
    fields, hints = dataclasses.fields(kind), typing.get_type_hints(kind)
    if not fields:
        properties: dict[str, Any] = {name: {"const": True}}
    elif fields[0].name == "parts":
        properties = {name: {"type": "array", "items": {"$ref": f"#/$defs/{definition}"}, "minItems": 1}}
    else:
        properties = {name: _make_type(hints[fields[0].name])}
        properties |= {field.name: _make_type(hints[field.name]) for field in fields[1:]}
    required = [name, *(field.name for field in fields[1:] if field.default is dataclasses.MISSING)]
    first_line = (kind.__doc__ or "").partition("\n")[0]
    return {
        "type": "object",
        "description": first_line,
        "additionalProperties": False,
        "properties": properties,
        "required": required,
    }


def _make_type(hint: Any) -> dict[str, Any]:
    origin = typing.get_origin(hint)
    if origin is typing.Literal:
        return {"enum": list(typing.get_args(hint))}
    if origin is tuple:
        return {"type": "array", "items": _make_type(typing.get_args(hint)[0])}
    if origin in (types.UnionType, typing.Union):
        return {"anyOf": [_make_type(part) for part in typing.get_args(hint)]}
    return {"type": _JSON_TYPES[hint]}
