# SPDX-License-Identifier: Apache-2.0
"""What a restore does to each leaf, in words."""

import jax.numpy as jnp
import pytest

import ckpttools as ct
from ckpttools.surgery.altered_leaves import list_altered_leaves, list_leaves
from tests.ckpttools.surgery.plans import leaf, nested, plan

STATE = {
    "m": {
        "dec": {"w": leaf(2)},
        "table": leaf(4),
        "part": leaf(1),
        "half": leaf(2, dtype=jnp.bfloat16),
        "same": leaf(2),
    }
}


OPERATIONS = [
    ct.Rename("m.enc", "m.dec"),
    ct.Drop("m.old"),
    ct.Pad("m.table", fill=0.0),
    ct.Slice("m.part"),
    ct.Cast("m.half", "float32", "bfloat16"),
]


@pytest.fixture(scope="module")
def made():
    return plan(nested("m.enc.w", "m.old", "m.table", "m.part", "m.half", "m.same"), STATE, OPERATIONS)


def test_each_leaf_says_what_was_done_to_it(made):
    assert {str(each) for each in list_leaves(made)} == {
        "m.dec.w: renamed from m.enc.w, float32[2]",
        "m.table: padded, float32[2] to float32[4]",
        "m.part: sliced, float32[2] to float32[1]",
        "m.half: cast, float32[2] to bfloat16[2]",
        "m.same: restored, float32[2]",
        "m.old: dropped, float32[2]",
    }


def test_unchanged_leaves_are_left_out_of_the_report(made):
    assert "m.same" in {each.name for each in list_leaves(made)}
    assert "m.same" not in {each.name for each in list_altered_leaves(made)}
    assert len(list_altered_leaves(made)) == len(list_leaves(made)) - 1


def test_several_changes_of_one_leaf_are_joined():
    both = plan(
        nested("m.a"),
        {"m": {"b": leaf(4, dtype=jnp.bfloat16)}},
        [ct.Rename("m.a", "m.b"), ct.Cast("m.b", "float32", "bfloat16"), ct.Pad("m.b", fill=0.0)],
    )
    (each,) = list_leaves(both)
    assert each.action == "renamed, cast, padded"
    assert each.as_dict() == {
        "name": "m.b",
        "action": each.action,
        "source": "m.a",
        "before": "float32[2]",
        "after": "bfloat16[4]",
    }


def test_a_leaf_that_keeps_its_value_has_no_source():
    kept = plan(nested("m.a"), {"m": {"a": leaf(2), "new": jnp.ones(1)}}, [ct.Reinit("m.new")])
    (each,) = list_altered_leaves(kept)
    assert (str(each), each.source) == ("m.new: kept", "")
