# SPDX-License-Identifier: Apache-2.0
"""Surgery as values: what exists is legal, and goes through TOML unchanged."""

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


def test_only_operations_are_part_of_a_surgery():
    with pytest.raises(ct.SpecError, match="'a' is not a surgery operation") as caught:
        ct.Surgery(["a"])
    assert "ct.Rename" in caught.value.fix
