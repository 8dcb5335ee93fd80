# SPDX-License-Identifier: Apache-2.0
"""Surgery as values: what exists is legal, and goes through TOML unchanged."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ckpttools as ct

ALL = [
    ct.Rename("model.blocks.*.attn", "model.layers.*.attention"),
    ct.Rename("{a,b}.**", "*.**"),
    ct.Drop("model.decoder"),
    ct.Cast("model", "float32", "bfloat16"),
    ct.Reinit("{lora_a,lora_b}"),
    ct.Pad("embedding"),
    ct.Pad("embedding", fill=0.5, start=(1, 2)),
    ct.Slice("embedding", start=(3,)),
    ct.Copy("model.**", "ema.**"),
    ct.Transpose("kernel"),
    ct.Transpose("kernel", axes=(0, 2, 1)),
    ct.Stack("model.layers.*", "model.layers"),
    ct.Stack("**.layers_*", "**.layers", axis=1),
    ct.Unstack("model.layers", "model.layers.*"),
    ct.Merge("model.*.{q,k,v}", "model.*.qkv", axis=0),
    ct.Split("model.*.qkv", "model.*.{q,k,v}", sizes=(8, 2, 2)),
    ct.Split("gate_up", "{gate,up}", interleaved=True),
]

PARTS = st.text("abc_", min_size=1, max_size=4)
NAMES = st.lists(PARTS, min_size=1, max_size=3).map(".".join)
OPERATIONS = st.one_of(
    st.builds(ct.Rename, NAMES, NAMES),
    st.builds(ct.Drop, NAMES),
    st.builds(ct.Reinit, NAMES),
    st.builds(ct.Cast, NAMES, st.sampled_from(["float32", "int8"]), st.sampled_from(["bfloat16", "bool"])),
    st.builds(ct.Pad, NAMES, st.one_of(st.just("template"), st.floats(-1e9, 1e9)), st.just((1, 0))),
    st.builds(ct.Slice, NAMES, st.just((2,))),
)


def test_every_operation_goes_through_a_file_unchanged(tmp_path):
    surgery = ct.Surgery(ALL)
    (tmp_path / "surgery.toml").write_text(
        "# other tables may stand beside them\n[model]\nx = 1\n\n" + surgery.to_toml()
    )
    assert ct.Surgery.load(tmp_path / "surgery.toml") == surgery
    assert hash(surgery) == hash(ct.Surgery(tuple(ALL)))


@given(st.lists(OPERATIONS, max_size=5))
@settings(max_examples=50, deadline=None)
def test_toml_round_trips(operations):
    assert ct.Surgery.from_toml(ct.Surgery(operations).to_toml()) == ct.Surgery(operations)


def test_surgeries_are_joined_in_order():
    both = ct.Surgery(ALL[:1]) + ALL[1:]
    assert (list(both), len(both)) == (ALL, len(ALL))


@pytest.mark.parametrize(
    ("make", "text", "fix"),
    [
        pytest.param(lambda: ct.Drop("a..b"), "two dots", "**", id="pattern"),
        pytest.param(lambda: ct.Drop("**:Linear"), "asks for a class", "'**'", id="class"),
        pytest.param(lambda: ct.Drop(3), "not a pattern", "layers", id="not a string"),
        pytest.param(lambda: ct.Rename("a", ""), "has no valid new name", "new_name", id="empty name"),
        pytest.param(lambda: ct.Rename("a.*", "b"), "has *, no wildcard", "same wildcards", id="wildcards"),
        pytest.param(lambda: ct.Rename("a.{b,{c,d}}", "a.*"), "braces inside braces", "several", id="nested braces"),
        pytest.param(lambda: ct.Rename("a.b", "a.[0]"), "has no valid new name", "new_name", id="slice on the right"),
        pytest.param(lambda: ct.Cast("a", "flaot32", "int8"), "unknown dtype 'flaot32'", "float32", id="dtype"),
        pytest.param(lambda: ct.Pad("a", fill="zero"), "fill='zero'", "fill=0.0", id="fill"),
        pytest.param(lambda: ct.Pad("a", start=[1]), "start=[1]", "start=(0, 0)", id="start of a pad"),
        pytest.param(lambda: ct.Slice("a", start=(-1,)), "start=(-1,)", "start=(0, 0)", id="start of a slice"),
        pytest.param(lambda: ct.Copy("a.*", "b"), "has *, no wildcard", "same wildcards", id="wildcards of a copy"),
        pytest.param(lambda: ct.Transpose("a", axes=(0, 2)), "axes=(0, 2)", "axes=(0, 2, 1)", id="axes"),
        pytest.param(lambda: ct.Stack("a.b", "a"), "do not correspond", "model.layers.*", id="stack of one"),
        pytest.param(lambda: ct.Stack("a.**", "a"), "do not correspond", "model.layers.*", id="stack at any depth"),
        pytest.param(lambda: ct.Stack("a.*", "a", axis=True), "axis=True", "axis=0", id="axis"),
        pytest.param(lambda: ct.Unstack("a", "b"), "do not correspond", "a.*.b", id="unstack to one"),
        pytest.param(lambda: ct.Merge("a.q", "a"), "do not correspond", "{q,k,v}", id="merge of one"),
        pytest.param(lambda: ct.Split("a", "a.{q}"), "do not correspond", "{q,k,v}", id="split to one"),
        pytest.param(lambda: ct.Split("a", "a.{q,k}", sizes=(3,)), "sizes=(3,)", "sizes=(8, 8)", id="sizes"),
        pytest.param(lambda: ct.Split("a", "b..{q,k}"), "no valid new name", "new_name", id="new name of a split"),
        pytest.param(lambda: ct.Merge("a.{q,k}", "a", interleaved=1), "interleaved=1", "=True", id="flag"),
        pytest.param(lambda: ct.Surgery(["a"]), "'a' is not a surgery operation", "ct.Rename", id="no operation"),
        pytest.param(lambda: ct.Migration(0), "from_version=0", "from_version=1", id="version"),
        pytest.param(lambda: ct.StateVersion(3, [ct.Migration(1)]), "migrations from 1", "ct.Migration(2", id="gap"),
        pytest.param(lambda: ct.StateVersion(1, [ct.Migration(0 + 1)]), "migrations from 1", "Migration", id="itself"),
        pytest.param(lambda: ct.CheckpointSpec(directory="x", state_version=0), "number=0", "number=1", id="spec"),
    ],
)
def test_what_cannot_be_honoured_is_refused(make, text, fix):
    with pytest.raises(ct.SpecError) as caught:
        make()
    assert text in caught.value.what
    assert fix in caught.value.fix


@pytest.mark.parametrize(
    ("text", "line", "word"),
    [
        pytest.param('[[surgery]]\ndrop = "a"\n\n[[surgery]]\nrenam = "a"\n', "line 4", "rename", id="unknown"),
        pytest.param('\n[[ surgery ]]\ndrp = "a"\n', "line 2", "drop", id="spaces in the brackets"),
        pytest.param('[[surgery]]\nrename = "a"\n', "line 1", "needs new", id="missing field"),
        pytest.param('[[surgery]]\ndrop = "a"\nfil = 1\n', "line 1", "no field 'fil'", id="unknown field"),
        pytest.param('[[surgery]]\ndrop = "a"\npad = "b"\n', "line 1", "one operation", id="two"),
        pytest.param("surgery = [3]\n", "<text>", "begins with its name", id="no table"),
        pytest.param("[[sugery]]\nx = 1\n", "no [[surgery]]", "the file has 'sugery'", id="no tables"),
        pytest.param("[[surgery]\n", "not TOML", "", id="no TOML"),
    ],
)
def test_errors_in_a_file_name_the_line(text, line, word):
    with pytest.raises(ct.SpecFileError) as caught:
        ct.Surgery.from_toml(text)
    assert line in str(caught.value)
    assert word in str(caught.value)


def test_a_file_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(ct.SpecFileError, match="cannot be read"):
        ct.Surgery.load(tmp_path / "none.toml")


def test_a_version_with_its_migrations_goes_through_the_file_of_a_spec():
    version = ct.StateVersion(3, [ct.Migration(1, ALL), ct.Migration(2, ct.Drop("x"))])
    spec = ct.CheckpointSpec(directory="run", state_version=version)
    assert ct.CheckpointSpec.from_toml(spec.to_toml()) == spec
    assert ct.CheckpointSpec.from_json(spec.to_json()) == spec
    assert "state_version" in json.dumps(ct.json_schema())
    plain = ct.CheckpointSpec(directory="run", state_version=7)
    assert "state_version = 7" in plain.to_toml()
    assert ct.CheckpointSpec.from_toml(plain.to_toml()) == plain


@pytest.mark.parametrize(
    ("line", "text"),
    [
        pytest.param('state_version = "a"', "number='a'", id="no number"),
        pytest.param("state_version = { number = 2, migrations = 3 }", "is not a list of tables", id="no list"),
        pytest.param("state_version = { number = 2, migrations = [{ from = 1 }] }", "a migration", id="field"),
        pytest.param("state_version = { number = 2, migration = [] }", "state_version", id="field of the version"),
        pytest.param(
            'state_version = { number = 2, migrations = [{ from_version = 1, surgery = "x" }] }',
            "is not a surgery operation",
            id="surgery",
        ),
    ],
)
def test_a_wrong_version_in_a_spec_file_names_its_line(line, text):
    with pytest.raises(ct.SpecFileError, match="line 3") as caught:
        ct.CheckpointSpec.from_toml(f'[checkpoint]\ndirectory = "run"\n{line}\n')
    assert text in str(caught.value)
