# SPDX-License-Identifier: Apache-2.0
"""States to leaves and back: what is refused, and what a difference in structure looks like."""

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import ckpttools as ct
from ckpttools.store import digest
from ckpttools.tree import flatten
from ckpttools.tree import leaves as leaf_forms
from ckpttools.tree.containers import pack, unpack
from tests.ckpttools.behaviour.examples import Net, leaves


def round_trip(folder, value, template):
    spec = ct.CheckpointSpec(directory=folder)
    with ct.open(spec) as ckpt:
        ckpt.save(1, {"item": value})
        return ckpt.restore({"item": template}).state["item"]


def test_paths_of_a_module_and_of_its_split_state_are_equal():
    model = Net(nnx.Rngs(0))
    split = nnx.split(model)[1]
    assert [leaf.path for leaf in flatten.flatten_item(model).leaves] == [
        leaf.path for leaf in flatten.flatten_item(split).leaves
    ]


@flax.struct.dataclass
class TrainState:
    params: dict
    step: int


def test_dataclasses_optax_states_and_modules_inside_a_pytree(tmp_path):
    params = {"w": jnp.arange(3.0), "b": jnp.zeros(1)}
    transform = optax.chain(optax.clip(1.0), optax.masked(optax.adam(1e-3), {"w": True, "b": False}))

    def build(scale):
        scaled = jax.tree.map(lambda x: x + scale, params)
        model = Net(nnx.Rngs(int(scale)))
        return (TrainState(params=scaled, step=int(scale)), transform.init(scaled), {"model": model})

    value, template = build(3.0), build(5.0)
    restored = round_trip(tmp_path, value, template)
    assert leaves({"item": restored}) == leaves({"item": value})
    assert restored[0].step == 3
    assert restored[2]["model"] is template[2]["model"], "a live object is filled in place wherever it stands"


def test_a_variable_on_its_own_is_filled_in_place(tmp_path):
    variable = nnx.Param(jnp.zeros(3))
    restored = round_trip(tmp_path, {"p": nnx.Param(jnp.arange(3.0))}, {"p": variable})
    assert restored["p"] is variable
    np.testing.assert_array_equal(variable[...], [0, 1, 2])


def test_numbers_that_jit_turned_into_arrays_fit_a_fresh_state(tmp_path):
    restored = round_trip(tmp_path, {"step": jnp.asarray(7)}, {"step": 0})
    assert int(restored["step"]) == 7


def test_a_variable_shared_by_two_items_is_restored_in_both(tmp_path):
    model = Net(nnx.Rngs(0))
    state = {"model": model, "layer": model.layers[0]}
    with ct.open(ct.CheckpointSpec(directory=tmp_path)) as ckpt:
        ckpt.save(1, state)
        before = leaves(state)
        model.layers[0].kernel[...] = jnp.zeros((8, 8))
        ckpt.restore(state)
    assert leaves(state) == before


class Iterator:
    def __init__(self, state):
        self.state = state

    def get_state(self):
        return self.state

    def set_state(self, state):
        self.state = state


def test_the_state_of_an_iterator_is_rebuilt_from_what_was_stored(tmp_path):
    state = {"epoch": 3, "buffer": [np.arange(3), (b"x", None)], 7: {"deep": {}}, "key": jax.random.key(2)}
    fresh = Iterator({"epoch": 0})
    round_trip(tmp_path, Iterator(state), fresh)
    assert leaves({"x": fresh}) == leaves({"x": Iterator(state)})
    assert fresh.state["buffer"][1] == (b"x", None)
    assert 7 in fresh.state


@pytest.mark.parametrize("state", [b'{"last": 3}', 5, None, [], jax.random.key(1)], ids=repr)
def test_an_iterator_may_hand_out_a_single_value(tmp_path, state):
    """grain's `DataLoader` hands out bytes."""
    fresh = Iterator({"other": 1})
    round_trip(tmp_path, Iterator(state), fresh)
    assert leaves({"x": fresh}) == leaves({"x": Iterator(state)})
    assert type(fresh.state) is type(state)


def test_an_iterator_inside_a_dict_is_found(tmp_path):
    fresh = {"train": Iterator({}), "epoch": 0}
    restored = round_trip(tmp_path, {"train": Iterator({"at": 5}), "epoch": 2}, fresh)
    assert restored["epoch"] == 2
    assert fresh["train"].state == {"at": 5}


def test_an_iterator_that_refuses_its_state_leaves_the_model_as_it_was(tmp_path):
    class Picky(Iterator):
        def set_state(self, state):
            raise ValueError("no")

    spec = ct.CheckpointSpec(directory=tmp_path)
    with ct.open(spec) as ckpt:
        ckpt.save(1, {"model": Net(nnx.Rngs(0)), "data": Iterator({"at": 5})})
        state = {"model": Net(nnx.Rngs(1)), "data": Picky({})}
        before = leaves({"model": state["model"]})
        with pytest.raises(ValueError, match="no"):
            ckpt.restore(state)
    assert leaves({"model": state["model"]}) == before


def mismatches(folder, value, template):
    with pytest.raises(ct.StructureError) as caught:
        round_trip(folder, value, template)
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
def test_differences_are_told_in_the_words_of_the_user(tmp_path, value, template, line):
    assert line in mismatches(tmp_path, {"x": value}, {"x": template})


def test_hundreds_of_differences_are_told_by_kind_and_whole_in_the_attribute(tmp_path):
    old, new = ({f"w{n}": jnp.ones(size) for n in range(120)} for size in (2, 3))
    with pytest.raises(ct.StructureError, match=r"item.w0: .* \(and 119 more of its kind, to item.w99\)") as caught:
        round_trip(tmp_path, old, new)
    assert len(caught.value.mismatches) == 120
    assert str(caught.value).count("on disk") == 1


@pytest.mark.parametrize(
    "state",
    [
        pytest.param({"deep": None}, id="a state that holds itself"),
        pytest.param({1.5: "x"}, id="a float as a key"),
        pytest.param({"x": object()}, id="an object"),
    ],
)
def test_states_of_iterators_that_cannot_be_written_are_refused(tmp_path, state):
    if "deep" in state:
        state["deep"] = state
    with ct.open(ct.CheckpointSpec(directory=tmp_path)) as ckpt, pytest.raises(ct.LeafError) as caught:
        ckpt.save(1, {"data": Iterator(state)})
    assert caught.value.fix


def test_a_key_of_a_pytree_that_is_no_name_is_refused(tmp_path):
    with ct.open(ct.CheckpointSpec(directory=tmp_path)) as ckpt, pytest.raises(ct.LeafError, match="key True of type"):
        ckpt.save(1, {"x": {True: jnp.ones(1)}})


@pytest.mark.parametrize("skeleton", [5, {"set": []}, {"dict": [["a"]]}, "x", None, {"dict": [], "list": []}])
def test_skeletons_that_make_no_sense_are_refused(skeleton):
    with pytest.raises(ct.CorruptStepError):
        unpack(skeleton, [1])


def test_skeletons_that_are_too_deep_are_refused():
    skeleton = 0
    for _ in range(200):
        skeleton = {"list": [skeleton]}
    with pytest.raises(ct.CorruptStepError, match="deeper"):
        unpack(skeleton, [1])


def test_packing_goes_both_ways():
    value = {"a": [1, (2, {"b": None})], 3: {}, "c": []}
    skeleton, found = pack(value, ())
    assert unpack(skeleton, [leaf.value for leaf in found]) == value


def test_digests_of_unknown_kind_and_strange_values_are_refused():
    with pytest.raises(ct.CorruptStepError, match="unknown kind"):
        digest.hash_bytes("md5", b"")
    with pytest.raises(ct.CorruptStepError):
        leaf_forms.decode_value({"float": 3})
    with pytest.raises(ct.LeafError, match="unknown dtype"):
        leaf_forms._get_key_implementation(jax.ShapeDtypeStruct((), jnp.float32))


def test_an_empty_string_comes_back_as_one(tmp_path):
    value = {"empty": "", "none": None, "zero": 0, "no": False, "text": "x"}
    template = dict.fromkeys(value, "before")
    assert round_trip(tmp_path, value, template) == value


@pytest.mark.parametrize("dtype", [">f4", ">i8", "<f4", ">c8"])
def test_an_array_of_any_byte_order_is_restored(tmp_path, dtype):
    value = np.arange(5).astype(dtype)
    restored = round_trip(tmp_path, {"a": value}, {"a": np.zeros_like(value)})["a"]
    np.testing.assert_array_equal(restored, value)


def test_keys_without_elements_are_restored(tmp_path):
    for name in ("threefry2x32", "rbg"):
        keys = jax.random.split(jax.random.key(0, impl=name), 3)[:0]
        one = jax.random.key(7, impl=name)
        restored = round_trip(tmp_path / name, {"none": keys, "one": one}, {"none": keys, "one": one})
        assert restored["none"].shape == (0,)
        assert restored["none"].dtype == keys.dtype
        assert jax.random.key_data(restored["one"]).tolist() == jax.random.key_data(one).tolist()


def test_a_dtype_that_cannot_be_written_is_refused_by_name_before_the_save(tmp_path):
    for value in (jnp.ones(2, jnp.uint4), np.ones(2, np.longdouble)):
        with pytest.raises(ct.LeafError, match=r"item\.a is an array of dtype"):
            round_trip(tmp_path, {"a": value}, {"a": value})
    empty = np.ones((0, 2), jnp.uint4)
    assert round_trip(tmp_path, {"a": empty}, {"a": empty})["a"].shape == (0, 2)


def test_an_int_of_any_length_is_restored(tmp_path):
    value = {"large": 10**5000, "negative": -(2**60)}
    assert round_trip(tmp_path, value, {"large": 0, "negative": 0}) == value


def test_a_hostile_skeleton_or_record_is_refused():
    with pytest.raises(ct.CorruptStepError, match="is not valid"):
        unpack({"dict": [[[1], 0]]}, [5])
    for data in (
        {"path": [], "kind": "array", "shape": [2], "dtype": "float32", "digest": 5},
        {"path": [], "kind": "empty", "shape": [2**40], "dtype": "float32"},
        {"path": [], "kind": "array", "shape": [2], "dtype": "object", "digest": "xxh3:0"},
    ):
        with pytest.raises(ct.CorruptStepError):
            leaf_forms.Record.from_json(data)
