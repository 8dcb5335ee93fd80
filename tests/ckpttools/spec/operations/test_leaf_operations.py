# SPDX-License-Identifier: Apache-2.0
"""Operations on single leaves: what exists is legal."""

import pytest

import ckpttools as ct
from ckpttools.spec.operations import DTYPES
from ckpttools.tree.records import parse_dtype


@pytest.mark.parametrize(
    ("make", "text", "fix"),
    [
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
    ],
)
def test_what_cannot_be_honoured_is_refused(make, text, fix):
    with pytest.raises(ct.SpecError) as caught:
        make()
    assert text in caught.value.what
    assert fix in caught.value.fix


@pytest.mark.parametrize("name", DTYPES)
def test_every_dtype_of_a_cast_exists(name):
    assert parse_dtype(name).name == name
