# SPDX-License-Identifier: Apache-2.0
"""The schema of a run file knows every value that a file can hold."""

import json

import pytest

import ckpttools as ct
from ckpttools.spec.operations import OPERATIONS
from ckpttools.spec.spec_file import RETENTIONS, TRIGGERS


def test_the_schema_knows_every_value():
    schema = ct.json_schema()
    json.dumps(schema)
    names = {next(iter(entry["properties"])) for entry in schema["$defs"]["trigger"]["oneOf"]}
    assert names == {"every_steps", "every_seconds", "at_steps", "on_improvement", "adaptive", "any_of", "all_of"}
    on_improvement = schema["$defs"]["trigger"]["oneOf"][3]
    assert on_improvement["required"] == ["on_improvement", "mode"]
    assert on_improvement["properties"]["mode"] == {"enum": ["min", "max"]}
    storage = schema["properties"]["checkpoint"]["properties"]["storage"]["properties"]
    assert set(storage) == {"asynchronous", "compression", "min_free", "when_full", "timeout_s"}
    assert storage["min_free"]["anyOf"] == [{"type": "string"}, {"type": "integer"}]


def test_the_schema_knows_the_fields_of_a_mirror():
    schema = ct.json_schema()["properties"]["checkpoint"]["properties"]["mirror"]
    table = schema["anyOf"][1]
    assert set(table["properties"]) == {"url", "keep", "options", "verify", "must_answer", "wait_s"}
    assert table["properties"]["verify"] == {"enum": ["readback", "size"]}


@pytest.mark.parametrize(
    ("definition", "known"), [("trigger", TRIGGERS), ("retention", RETENTIONS), ("operation", OPERATIONS)]
)
def test_each_value_of_a_file_has_an_entry(definition, known):
    entries = ct.json_schema()["$defs"][definition]["oneOf"]
    assert [next(iter(entry["properties"])) for entry in entries] == list(known)
    assert all(entry["description"] and entry["additionalProperties"] is False for entry in entries)


def test_the_schema_knows_the_fields_of_a_spec():
    spec = ct.json_schema()["properties"]["checkpoint"]
    assert set(spec["properties"]) == set(json.loads(ct.CheckpointSpec(directory="run").to_json())) | {
        "exclude",
        "mirror",
        "state_version",
    }
    assert spec["required"] == ["directory"]


def find_references(value):
    if isinstance(value, dict):
        yield from [value["$ref"]] if "$ref" in value else []
        value = list(value.values())
    for each in value if isinstance(value, list) else []:
        yield from find_references(each)


def test_every_reference_leads_to_a_definition():
    schema = ct.json_schema()
    assert set(find_references(schema)) == {f"#/$defs/{name}" for name in schema["$defs"]}


@pytest.mark.parametrize(("field", "definition"), [("save", "trigger"), ("keep", "retention")])
def test_save_and_keep_are_one_value_or_a_list(field, definition):
    one, several = ct.json_schema()["properties"]["checkpoint"]["properties"][field]["anyOf"]
    assert one == {"$ref": f"#/$defs/{definition}"}
    assert (several["type"], several["items"], several["minItems"]) == ("array", one, 1)


def test_a_version_is_a_number_or_a_table_with_migrations():
    number, table = ct.json_schema()["properties"]["checkpoint"]["properties"]["state_version"]["anyOf"]
    assert number == {"type": "integer", "minimum": 1}
    migration = table["properties"]["migrations"]["items"]
    assert set(migration["properties"]) == {"from_version", "surgery"}
    assert migration["properties"]["surgery"] == ct.json_schema()["properties"]["surgery"]
