# SPDX-License-Identifier: Apache-2.0
"""The pattern of an operation is checked, and an operation prints as the code that makes it."""

import pytest

import ckpttools as ct
from ckpttools.spec.operations import as_code, find_wildcards, split_segments


@pytest.mark.parametrize(
    ("make", "text", "fix"),
    [
        pytest.param(lambda: ct.Drop("a..b"), "two dots", "**", id="pattern"),
        pytest.param(lambda: ct.Drop("**:Linear"), "contains a class", "'**'", id="class"),
        pytest.param(lambda: ct.Drop(3), "not a pattern", "layers", id="not a string"),
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
