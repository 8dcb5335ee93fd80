# SPDX-License-Identifier: Apache-2.0
"""Operations of surgery: what exists is legal, and prints as the code that makes it."""

import pytest

import ckpttools as ct
from ckpttools.spec.operations import DTYPES, as_code, find_wildcards, split_segments
from ckpttools.tree.records import parse_dtype


@pytest.mark.parametrize(
    ("make", "text", "fix"),
    [
        pytest.param(lambda: ct.Drop("a..b"), "two dots", "**", id="pattern"),
        pytest.param(lambda: ct.Drop("**:Linear"), "contains a class", "'**'", id="class"),
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
    ],
)
def test_what_cannot_be_honoured_is_refused(make, text, fix):
    with pytest.raises(ct.SpecError) as caught:
        make()
    assert text in caught.value.what
    assert fix in caught.value.fix


@pytest.mark.parametrize(
    ("operation", "code"),
    [
        (ct.Rename("a", "b"), 'ct.Rename("a", "b")'),
        (ct.Cast("a", "float32", "bfloat16"), 'ct.Cast("a", "float32", "bfloat16")'),
        (ct.Pad("a"), 'ct.Pad("a")'),
        (ct.Pad("a", fill=0.5, start=(1, 2)), 'ct.Pad("a", fill=0.5, start=(1, 2))'),
        (ct.Slice("a", start=(3,)), 'ct.Slice("a", start=(3,))'),
    ],
    ids=lambda each: each if isinstance(each, str) else "",
)
def test_an_operation_as_code_builds_it_again(operation, code):
    assert as_code(operation) == code
    assert eval(code, {"ct": ct}) == operation


def test_segments_split_at_dots_outside_braces():
    assert split_segments("a.{b.c,d}.*") == ["a", "{b.c,d}", "*"]


@pytest.mark.parametrize(
    ("pattern", "wildcards"),
    [("a.b", []), ("a.*.b*", ["*", "*"]), ("**.{q,v}", ["**", "{q,v}"]), ("a.[-1].w", ["[-1]"])],
)
def test_wildcards_are_found_in_order(pattern, wildcards):
    assert find_wildcards(pattern) == wildcards


@pytest.mark.parametrize("name", DTYPES)
def test_every_dtype_of_a_cast_exists(name):
    assert parse_dtype(name).name == name
