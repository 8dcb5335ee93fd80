# SPDX-License-Identifier: Apache-2.0
"""Stored leaves are joined, taken apart, copied and transposed, and every value lands where it should."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ckpttools as ct
from tests.ckpttools.surgery.plans import leaf, nested, plan

RNG = np.random.default_rng(0)


def load(disk, state, operations):
    """Return what a restore of `disk` into `state` places, through the plan and the host arrays."""
    arrays = {
        item: {
            tuple(key.key for key in path): np.asarray(each)
            for path, each in jax.tree_util.tree_leaves_with_path(value)
        }
        for item, value in disk.items()
    }
    made = plan(disk, state, operations)
    assert made.differences == ()
    read = {
        item: {record.path: arrays[item][record.path] for record in records}
        for item, records in made.collect_records().items()
    }
    return {item: host.arrays for item, host in made.make_host_items(state, read).items()}["m"]


def block(seed):
    rng = np.random.default_rng(seed)
    return {"up": {"k": rng.normal(size=(3, 5)), "b": rng.normal(size=5)}, "down": {"k": rng.normal(size=(5, 3))}}


UNROLLED = {"m": {"layers": {str(n): block(n) for n in range(12)}, "head": RNG.normal(size=(3, 3))}}
SCANNED = {
    "m": {"layers": jax.tree.map(lambda *each: np.stack(each), *map(block, range(12))), "head": UNROLLED["m"]["head"]}
}


def test_layers_are_stacked_in_the_order_of_their_numbers():
    placed = load(UNROLLED, SCANNED, [ct.Stack("m.layers.*", "m.layers")])
    np.testing.assert_array_equal(placed["layers", "up", "k"], SCANNED["m"]["layers"]["up"]["k"])
    np.testing.assert_array_equal(placed["layers", "up", "b"][10], block(10)["up"]["b"])


def test_unstack_is_the_way_back():
    placed = load(SCANNED, UNROLLED, [ct.Unstack("m.layers", "m.layers.*")])
    for n in range(12):
        np.testing.assert_array_equal(placed["layers", str(n), "down", "k"], block(n)["down"]["k"])
    # Each has memory of its own: on CPU a device array may be the host's memory.
    assert not np.shares_memory(placed["layers", "0", "up", "b"], placed["layers", "1", "up", "b"])


def test_layers_are_transposed_before_they_are_stacked():
    state = jax.tree.map(lambda each: each, SCANNED)
    state["m"]["layers"]["down"]["k"] = np.moveaxis(SCANNED["m"]["layers"]["down"]["k"], 1, 2)
    operations = [ct.Transpose("m.layers.*.down.k"), ct.Stack("m.layers.*", "m.layers")]
    placed = load(UNROLLED, state, operations)
    np.testing.assert_array_equal(placed["layers", "down", "k"], state["m"]["layers"]["down"]["k"])
    after = load(UNROLLED, state, [ct.Stack("m.layers.*", "m.layers"), ct.Transpose("m.layers.down.k", axes=(0, 2, 1))])
    np.testing.assert_array_equal(after["layers", "down", "k"], placed["layers", "down", "k"])


FUSED = {"m": {"h": {"0": {"qkv": {"k": RNG.normal(size=(4, 10)), "b": RNG.normal(size=10)}}}}}


@pytest.mark.parametrize(
    ("options", "cut"),
    [
        pytest.param({"sizes": (6, 2, 2)}, [np.s_[..., :6], np.s_[..., 6:8], np.s_[..., 8:]], id="sizes"),
        pytest.param({"interleaved": True}, [np.s_[..., 0::2], np.s_[..., 1::2]], id="interleaved"),
        pytest.param({}, [np.s_[..., :5], np.s_[..., 5:]], id="equal"),
    ],
)
def test_a_fused_array_is_split_and_merged_again(options, cut):
    names = "qkv"[: len(cut)]
    fused = FUSED["m"]["h"]["0"]["qkv"]
    apart = {"m": {"h": {"0": {name: {key: each[at] for key, each in fused.items()} for name, at in zip(names, cut)}}}}
    braces = "{" + ",".join(names) + "}"
    placed = load(FUSED, apart, [ct.Split("m.h.*.qkv", f"m.h.*.{braces}", **options)])
    for name, at in zip(names, cut):
        np.testing.assert_array_equal(placed["h", "0", name, "k"], fused["k"][at])
        np.testing.assert_array_equal(placed["h", "0", name, "b"], fused["b"][at])
    merging = {"interleaved": True} if "interleaved" in options else {}
    back = load(apart, FUSED, [ct.Merge(f"m.h.*.{braces}", "m.h.*.qkv", **merging)])
    np.testing.assert_array_equal(back["h", "0", "qkv", "k"], fused["k"])


def test_a_copy_is_transposed_and_the_original_stays():
    disk = {"m": {"embed": RNG.normal(size=(7, 3))}}
    state = {"m": {"embed": np.zeros((7, 3)), "head": np.zeros((3, 7))}}
    placed = load(disk, state, [ct.Copy("m.embed", "m.head"), ct.Transpose("m.head")])
    np.testing.assert_array_equal(placed["embed",], disk["m"]["embed"])
    np.testing.assert_array_equal(placed["head",], disk["m"]["embed"].T)
    assert not np.shares_memory(placed["embed",], placed["head",])


def test_a_stacked_array_is_cast_and_padded():
    disk = {"m": {"l": {str(n): np.full((2, 3), n, np.float32) for n in range(2)}}}
    state = {"m": {"l": jnp.full((2, 4, 3), 9, jnp.bfloat16)}}
    operations = [ct.Cast("m", "float32", "bfloat16"), ct.Stack("m.l.*", "m.l"), ct.Pad("m.l")]
    placed = load(disk, state, operations)["l",]
    assert (placed.dtype, placed[1, 0, 0], placed[1, 3, 0]) == (jnp.bfloat16, 1, 9)


@pytest.mark.parametrize(
    ("disk", "operation", "text"),
    [
        pytest.param(
            nested("m.l.0.k", "m.l.0.b", "m.l.1.k", "m.l.2.k", "m.l.2.b"),
            ct.Stack("m.l.*", "m.l"),
            "lacks that leaf",
            id="a layer without a bias",
        ),
        pytest.param({"m": {"l": {"0": leaf(2), "1": leaf(3)}}}, ct.Stack("m.l.*", "m.l"), "one dtype", id="shapes"),
        pytest.param({"m": {"qkv": leaf(7)}}, ct.Split("m.qkv", "m.{q,k,v}"), "do not add up", id="indivisible"),
        pytest.param({"m": {"l": leaf()}}, ct.Unstack("m.l", "m.l.*"), "axis 0 does not exist", id="a scalar"),
        pytest.param({"m": {"k": leaf(2, 3)}}, ct.Transpose("m.k", axes=(0, 2, 1)), "axes has 3 entries", id="rank"),
        pytest.param({"m": {"a": leaf(2), "b": leaf(2)}}, ct.Copy("m.a", "m.b"), "gives two leaves", id="occupied"),
        pytest.param({"m": {"a": 3}}, ct.Transpose("m.a"), "plain value", id="plain value"),
        pytest.param({"m": {"a": leaf(2)}}, ct.Stack("m.z.*", "m.z"), "matches nothing", id="nothing"),
    ],
)
def test_what_cannot_be_restructured_is_an_error(disk, operation, text):
    with pytest.raises(ct.StructureError, match=text):
        plan(disk, {"m": {"x": leaf(2)}}, [operation])


def test_a_pad_comes_after_joins():
    with pytest.raises(ct.StructureError, match="come last"):
        plan({"m": {"l": {"0": leaf(2)}}}, {"m": {"l": leaf(1, 2)}}, [ct.Pad("m.l.*"), ct.Stack("m.l.*", "m.l")])
