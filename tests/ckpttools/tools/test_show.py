# SPDX-License-Identifier: Apache-2.0
"""The tree of a step from its manifest, newest first; no array is read."""

import jax.numpy as jnp
import pytest
from orbax.checkpoint import v1

import ckpttools as ct
from ckpttools.store import layout, orbax
from ckpttools.tools.show import format_leaf
from tests.ckpttools.restore.test_first_intact import STATE


def test_the_newest_step_is_shown_without_reading_arrays(run, monkeypatch):
    monkeypatch.setattr(orbax, "read", lambda *_: pytest.fail("an array was read"))
    shown = ct.show(run)
    assert (shown.step, shown.state, shown.reason) == (30, "committed", "asked for")
    assert {leaf.name: (leaf.shape, leaf.bytes) for leaf in shown.leaves} == {
        f"{item}.{name}": (array.shape, array.nbytes)
        for item, arrays in STATE.items()
        for name, array in arrays.items()
    }
    assert ct.show(run, 10).step == 10


def test_a_missing_step_names_those_that_exist(run):
    with pytest.raises(ct.StepNotFoundError, match="has no step 99") as caught:
        ct.show(run, 99)
    assert caught.value.fix == "available: 10, 20, 30."


def test_a_damaged_step_raises_and_is_not_the_newest(run):
    (run / "30" / layout.MANIFEST).write_text("{}")
    with pytest.raises(ct.CorruptStepError):
        ct.show(run, 30)
    assert ct.show(run).step == 20


def test_a_directory_without_steps_raises(tmp_path):
    with pytest.raises(ct.StepNotFoundError, match="no readable step"):
        ct.show(tmp_path)


@pytest.mark.parametrize(
    ("leaf", "text"),
    [
        (ct.ShownLeaf(name="a", kind="array", shape=(2, 3), dtype="bfloat16"), "bfloat16[2,3]"),
        (ct.ShownLeaf(name="a", kind="key", dtype="threefry2x32"), "key threefry2x32[]"),
        (ct.ShownLeaf(name="a", kind="value", dtype="str", value="x"), "'x'"),
        (ct.ShownLeaf(name="a", kind="value", value="(not read)"), "(not read)"),
    ],
    ids=["array", "key", "value", "unread value"],
)
def test_a_leaf_is_printed_by_its_kind(leaf, text):
    assert format_leaf(leaf) == text


def test_values_that_json_lacks_become_strings():
    leaves = (
        ct.ShownLeaf(name="a", kind="value", dtype="bytes", value=b"x"),
        ct.ShownLeaf(name="b", kind="value", dtype="int", value=3),
    )
    shown = ct.ShownStep(step=1, state="committed", leaves=leaves)
    assert [leaf["value"] for leaf in shown.as_dict()["leaves"]] == ["b'x'", 3]


def test_a_step_prints_one_line_for_each_leaf():
    leaf = ct.ShownLeaf(name="model.kernel", kind="array", shape=(2, 3), dtype="float32", bytes=24)
    shown = ct.ShownStep(step=500, state="committed", total_bytes=1024, leaves=(leaf,))
    assert str(shown).splitlines() == ["step 500: committed, 1 leaves, 1,024 bytes", "  model.kernel: float32[2,3]"]


def test_a_step_of_plain_orbax_is_shown_from_its_metadata(tmp_path):
    with v1.Context():
        v1.save_checkpointables(tmp_path / "3", {"model": {"a": jnp.ones((2, 3), jnp.bfloat16)}, "data": {"epoch": 4}})
    shown = ct.show(tmp_path)
    assert (shown.step, shown.state) == (3, "unverified")
    leaves = {leaf.name: leaf for leaf in shown.leaves}
    assert (leaves["model.a"].shape, leaves["model.a"].dtype, leaves["model.a"].bytes) == ((2, 3), "bfloat16", 12)
    assert (leaves["data.epoch"].kind, leaves["data.epoch"].value) == ("value", "(not read)")
