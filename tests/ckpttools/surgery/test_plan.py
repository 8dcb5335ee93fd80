# SPDX-License-Identifier: Apache-2.0
"""A plan: the leaves to read, and the host arrays with their operations applied."""

import jax.numpy as jnp
import numpy as np

import ckpttools as ct
from tests.ckpttools.surgery.plans import leaf, nested, plan

OPERATIONS = [
    ct.Rename("m.enc", "n.dec"),
    ct.Pad("m.table", fill=0.0),
    ct.Cast("m.half", "float32", "bfloat16"),
    ct.Reinit("m.new"),
]


def make_plan():
    state = {
        "m": {"table": leaf(4), "half": leaf(2, dtype=jnp.bfloat16), "new": jnp.ones(1)},
        "n": {"dec": {"w": leaf(2)}},
    }
    return plan(nested("m.enc.w", "m.table", "m.half"), state, OPERATIONS), state


def test_leaves_are_read_by_the_item_that_stores_them():
    made, _ = make_plan()
    assert made.differences == ()
    records = made.collect_records()
    assert list(records) == ["m"]
    assert {record.path for record in records["m"]} == {("enc", "w"), ("table",), ("half",)}


def test_arrays_are_changed_and_sorted_by_their_target():
    made, state = make_plan()
    arrays = {"m": {path: np.array([1, 2], np.float32) for path in (("enc", "w"), ("table",), ("half",))}}
    items = made.make_host_items(state, arrays)
    assert items["n"].arrays["dec", "w"].tolist() == [1, 2]
    assert items["m"].arrays["table",].tolist() == [1, 2, 0, 0]
    assert items["m"].arrays["half",].dtype == jnp.bfloat16
    assert ("new",) not in items["m"].records, "the state keeps its own value"
    assert arrays == {"m": {}}, "each array is passed on, not copied"


def test_a_plan_can_drop_the_values_of_the_state():
    made, state = make_plan()
    kept = {".".join(each.path): each.template for each in made.placed_leaves}
    assert kept["m.new"] is state["m"]["new"], "control"
    dropped = made.drop_templates()
    assert {each.template for each in dropped.placed_leaves} == {None}
    assert [each.path for each in dropped.placed_leaves] == [each.path for each in made.placed_leaves]


def test_a_source_is_named_as_it_is_stored():
    made, _ = make_plan()
    names = {".".join(each.path): each.source.stored_path for each in made.placed_leaves if each.source}
    assert names["n.dec.w"] == ("m", "enc", "w")
    assert names["m.table"] == ("m", "table")
