# SPDX-License-Identifier: Apache-2.0
"""Which variables are state: rules as values, in files, and their mistakes."""

import dataclasses
import json

import pytest

import ckpttools as ct
from ckpttools.spec.state import DEFAULT_RULES

RULES = {
    "nothing": (),
    "default": ct.Exclude(),
    "one": ct.Exclude(types=("Cache",), paths=("model.scratch.*", "buffer"), items=("model",)),
    "several": (ct.Exclude(items=("server",)), ct.Exclude(types=(), paths=("data",))),
}


@pytest.mark.parametrize("exclude", RULES.values(), ids=RULES)
def test_rules_round_trip_through_files(exclude):
    spec = ct.CheckpointSpec(directory="run", exclude=exclude)
    assert ct.CheckpointSpec.from_toml(spec.to_toml()) == spec
    assert ct.CheckpointSpec.from_json(spec.to_json()) == spec
    assert hash(spec) == hash(ct.CheckpointSpec(directory="run", exclude=exclude))


def test_the_default_leaves_specs_and_fingerprints_as_they_were():
    plain = ct.CheckpointSpec(directory="run")
    assert plain.exclude == DEFAULT_RULES
    assert "exclude" not in plain.to_toml()
    assert plain.fingerprint() == ct.CheckpointSpec(directory="run", exclude=ct.Exclude()).fingerprint()
    assert plain.fingerprint() != ct.CheckpointSpec(directory="run", exclude=()).fingerprint()


def test_a_spec_has_at_most_eight_fields():
    assert len(dataclasses.fields(ct.CheckpointSpec)) <= 8


def test_the_schema_knows_the_rules():
    table = ct.json_schema()["properties"]["checkpoint"]["properties"]["exclude"]
    assert set(table["anyOf"][0]["properties"]) == {"types", "paths", "items"}
    assert json.loads(json.dumps(table))


@pytest.mark.parametrize(
    ("rule", "path", "types", "reason"),
    [
        (ct.Exclude(), ("model", "h", 0), ("Intermediate",), "Intermediate"),
        (ct.Exclude(), ("model", "h", 0), ("Perturbation", "Intermediate"), "Intermediate"),
        (ct.Exclude(), ("model", "h", 0), ("Param",), ""),
        (ct.Exclude(items=("model",)), ("server", "k"), ("Cache",), ""),
        (
            ct.Exclude(paths=("model.blocks.*.scratch",)),
            ("model", "blocks", 1, "scratch", "x"),
            (),
            "model.blocks.*.scratch",
        ),
        (ct.Exclude(paths=("scratch",)), ("model", "blocks", 1, "scratch"), (), "scratch"),
        (ct.Exclude(paths=("model.blocks.[1:]",)), ("model", "blocks", "2", "w"), (), "model.blocks.[1:]"),
        (ct.Exclude(paths=("model.blocks.[1:]",)), ("model", "blocks", "0", "w"), (), ""),
    ],
)
def test_a_rule_names_what_leaves_a_leaf_out(rule, path, types, reason):
    assert rule.find_reason(path, types) == reason


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: ct.Exclude(types="Cache"), "not a tuple of strings"),
        (lambda: ct.Exclude(types=("cache",)), "the name of its class: 'Cache'"),
        (lambda: ct.Exclude(types=("Intermediates",)), "'Intermediate'"),
        (lambda: ct.Exclude(types=("nnx.Cache",)), "does not name a type"),
        (lambda: ct.Exclude(paths=("model.[",)), r"paths=\('model.\[',\)"),
        (lambda: ct.Exclude(paths=("model.**:Cache",)), "contains a class"),
        (lambda: ct.Exclude(paths=("layers.[-1]",)), "counts from the end"),
        (lambda: ct.CheckpointSpec(directory="run", exclude=("Cache",)), "is not a rule"),
        (lambda: ct.CheckpointSpec(directory="run", exclude=None), "is not a rule"),
        (
            lambda: ct.CheckpointSpec.from_toml('[checkpoint]\ndirectory="r"\nexclude=[{type=["Cache"]}]'),
            "line 3.*'type'",
        ),
    ],
)
def test_mistakes_are_explained(make, match):
    with pytest.raises(ct.SpecError, match=match):
        make()
