# SPDX-License-Identifier: Apache-2.0
"""Operations that join and split arrays: what exists is legal."""

import pytest

import ckpttools as ct


@pytest.mark.parametrize(
    ("make", "text", "fix"),
    [
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
