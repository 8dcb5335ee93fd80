# SPDX-License-Identifier: Apache-2.0
"""A stored leaf that does not fit is described, not cast."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import ckpttools as ct
from tests.ckpttools.behaviour.examples import Net, leaves

from .round_trips import Iterator, round_trip


def mismatches(directory, value, template):
    with pytest.raises(ct.StructureError) as caught:
        round_trip(directory, value, template)
    return caught.value.mismatches


def test_a_missing_leaf_names_the_closest_one(tmp_path):
    lines = mismatches(tmp_path, {"kernel": jnp.ones(2)}, {"kernle": jnp.ones(2)})
    assert lines[0] == "item.kernle: not on disk; did you mean 'item.kernel'?"
    assert lines[1] == "item.kernel: on disk, not in the state passed in"


@pytest.mark.parametrize(
    ("value", "template", "line"),
    [
        pytest.param(jnp.ones(2), "text", "item.x: float32[2] on disk, a plain value here", id="array and text"),
        pytest.param("text", jnp.ones(2), "item.x: a plain value on disk, float32[2] here", id="text and array"),
        pytest.param(jnp.ones(2), jax.random.key(0), "item.x: float32[2] on disk, key threefry2x32[] here", id="key"),
        pytest.param(
            jax.random.key(0),
            jax.random.key(0, impl="rbg"),
            "item.x: key threefry2x32[] on disk, key rbg[] here",
            id="another key",
        ),
        pytest.param(
            {"a": 1}, Iterator({}), "item.x: holds a state (get_state/set_state) here and none on disk", id="iterator"
        ),
    ],
)
def test_a_difference_names_both_forms(tmp_path, value, template, line):
    assert line in mismatches(tmp_path, {"x": value}, {"x": template})


def test_many_differences_are_grouped_in_text_and_listed_as_data(tmp_path):
    old, new = ({f"w{n}": jnp.ones(size) for n in range(120)} for size in (2, 3))
    with pytest.raises(ct.StructureError, match=r"item.w0: .* \(and 119 more of its kind, to item.w99\)") as caught:
        round_trip(tmp_path, old, new)
    assert len(caught.value.mismatches) == 120
    assert str(caught.value).count("float32[2] on disk") == 1


def test_numbers_that_jit_turned_into_arrays_fit_a_fresh_state(tmp_path):
    restored = round_trip(tmp_path, {"step": jnp.asarray(7)}, {"step": 0})
    assert int(restored["step"]) == 7


def test_another_dtype_is_a_mismatch_and_not_a_cast(tmp_path):
    spec = ct.CheckpointSpec(directory=tmp_path)
    with ct.open(spec) as ckpt:
        ckpt.save(1, {"params": {"w": jnp.full(3, 0.7)}})
    with ct.open(spec) as ckpt, pytest.raises(ct.StructureError, match=r"params.w: float32\[3\] on disk, int32\[3\]"):
        ckpt.restore({"params": {"w": jnp.zeros(3, jnp.int32)}})


def test_another_shape_lists_the_leaves_and_changes_nothing(tmp_path):
    spec = ct.CheckpointSpec(directory=tmp_path)
    with ct.open(spec) as ckpt:
        ckpt.save(2, {"model": Net(nnx.Rngs(0))})
    other = {"model": Net(nnx.Rngs(0), width=4)}
    before = leaves(other)
    with ct.open(spec) as ckpt, pytest.raises(ct.StructureError) as caught:
        ckpt.restore(other)
    assert "model.layers.0.kernel: float32[8,8] on disk, float32[4,4] here" in caught.value.mismatches
    assert leaves(other) == before
    assert (tmp_path / "2" / "ckpttools.manifest").exists()


def test_a_missing_item_names_those_that_are_there(tmp_path):
    spec = ct.CheckpointSpec(directory=tmp_path)
    with ct.open(spec) as ckpt:
        ckpt.save(2, {"model": {"w": jnp.ones(2)}, "optimizer": {"m": jnp.ones(2)}})
    with ct.open(spec) as ckpt, pytest.raises(ct.StructureError, match="the step has model, optimizer"):
        ckpt.restore({"modle": {"w": jnp.ones(2)}})
