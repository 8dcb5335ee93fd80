# SPDX-License-Identifier: Apache-2.0
"""Any state to named leaves and back: modules, pytrees, variables and iterators."""

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import ckpttools as ct
from ckpttools.tree import flatten
from tests.ckpttools.behaviour.examples import Net, leaves

from .round_trips import Iterator, round_trip


def test_a_module_and_its_split_state_have_equal_paths():
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


def test_a_variable_shared_by_two_items_is_restored_in_both(tmp_path):
    model = Net(nnx.Rngs(0))
    state = {"model": model, "layer": model.layers[0]}
    with ct.open(ct.CheckpointSpec(directory=tmp_path)) as ckpt:
        ckpt.save(1, state)
        before = leaves(state)
        model.layers[0].kernel[...] = jnp.zeros((8, 8))
        ckpt.restore(state)
    assert leaves(state) == before


def test_an_iterators_state_is_rebuilt_from_what_was_stored(tmp_path):
    state = {"epoch": 3, "buffer": [np.arange(3), (b"x", None)], 7: {"deep": {}}, "key": jax.random.key(2)}
    fresh = Iterator({"epoch": 0})
    round_trip(tmp_path, Iterator(state), fresh)
    assert leaves({"x": fresh}) == leaves({"x": Iterator(state)})
    assert fresh.state["buffer"][1] == (b"x", None)
    assert 7 in fresh.state


@pytest.mark.parametrize("state", [b'{"last": 3}', 5, None, [], jax.random.key(1)], ids=repr)
def test_an_iterator_may_return_a_single_value(tmp_path, state):
    """grain's `DataLoader` returns bytes."""
    fresh = Iterator({"other": 1})
    round_trip(tmp_path, Iterator(state), fresh)
    assert leaves({"x": fresh}) == leaves({"x": Iterator(state)})
    assert type(fresh.state) is type(state)


def test_an_iterator_inside_a_dict_is_found(tmp_path):
    fresh = {"train": Iterator({}), "epoch": 0}
    restored = round_trip(tmp_path, {"train": Iterator({"at": 5}), "epoch": 2}, fresh)
    assert restored["epoch"] == 2
    assert fresh["train"].state == {"at": 5}


def test_an_iterator_that_refuses_its_state_leaves_the_model_unchanged(tmp_path):
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


def test_a_pytree_key_that_is_not_a_name_is_refused(tmp_path):
    with ct.open(ct.CheckpointSpec(directory=tmp_path)) as ckpt, pytest.raises(ct.LeafError, match="key True of type"):
        ckpt.save(1, {"x": {True: jnp.ones(1)}})


def test_names_that_orbax_would_merge_are_refused(tmp_path):
    with (
        ct.open(ct.CheckpointSpec(directory=tmp_path)) as ckpt,
        pytest.raises(ct.StructureError, match=r"share the name 'a\.b'"),
    ):
        ckpt.save(1, {"params": {"a.b": jnp.ones(1), "a": {"b": jnp.zeros(1)}}})


@pytest.mark.parametrize(
    ("keys", "is_refused"),
    [(("d", "d/"), True), (("d/", "d//"), False), (("d", "d//"), False), (("", "/"), True), (("a/b", "a"), False)],
)
def test_keys_that_tensorstore_takes_for_one_are_refused_at_the_save(tmp_path, keys, is_refused):
    state = {"m": {key: np.full(2, float(at)) for at, key in enumerate(keys)}}
    with ct.open(ct.CheckpointSpec(directory=tmp_path)) as ckpt:
        if is_refused:
            with pytest.raises(ct.StructureError, match="share the name"):
                ckpt.save(1, state)
            return
        ckpt.save(1, state)
    loaded = ct.load(tmp_path, {"m": {key: np.zeros(2) for key in keys}}).state["m"]
    assert [loaded[key].tolist() for key in keys] == [[0.0, 0.0], [1.0, 1.0]]


def test_plain_values_whose_keys_differ_by_a_slash_are_saved(tmp_path):
    restored = round_trip(
        tmp_path, {"a": np.ones(1), "a/": 3, "d": 1, "d/": 2}, {"a": np.zeros(1), "a/": 0, "d": 0, "d/": 0}
    )
    assert (restored["a/"], restored["d"], restored["d/"]) == (3, 1, 2)
