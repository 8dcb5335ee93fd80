# SPDX-License-Identifier: Apache-2.0
"""A state is flattened once, into records and the arrays that Orbax stores."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ckpttools as ct
from ckpttools.tree import snapshot


def test_a_blocking_snapshot_references_arrays_and_a_background_one_copies():
    array, buffers = np.arange(4.0), {}
    (referenced,) = snapshot.take({"item": {"w": array}}, None).items["item"].leaves
    (copied,) = snapshot.take({"item": {"w": array}}, buffers).items["item"].leaves
    array[0] = 7.0
    assert referenced.host_array[0] == 7.0
    assert copied.host_array[0] == 0.0
    (reused,) = snapshot.take({"item": {"w": array}}, buffers).items["item"].leaves
    assert reused.host_array is copied.host_array
    assert reused.host_array[0] == 7.0


def test_only_leaves_that_orbax_stores_have_an_array():
    state = {"item": {"w": jnp.ones((2, 3)), "none": jnp.ones((0, 3)), "key": jax.random.key(0), "name": "x"}}
    taken = snapshot.take(state, None)
    arrays = {leaf.record.path[0]: leaf.array for leaf in taken.items["item"].leaves}
    assert {name for name, array in arrays.items() if array is not None} == {"w", "key"}
    assert arrays["key"].tolist() == jax.random.key_data(jax.random.key(0)).tolist()
    assert taken.array_bytes == 2 * 3 * 4 + 2 * 4
    assert [record.path for record in taken.records["item"]] == [
        leaf.record.path for leaf in taken.items["item"].leaves
    ]


@pytest.mark.parametrize(
    ("state", "message"),
    [
        pytest.param(3, "the state is a int", id="no mapping"),
        pytest.param({"../x": 1}, "named '../x'", id="a name that is a path"),
        pytest.param({"metrics": 1}, "named 'metrics'", id="a reserved name"),
        pytest.param({"misc": {"f": object()}}, "misc.f is a builtins.object", id="an object"),
        pytest.param({"misc": np.array([{}])}, "dtype object", id="an object array"),
        pytest.param({"misc": np.ma.array([1, 2], mask=[0, 1])}, "misc is a masked array", id="a masked array"),
        pytest.param({"misc": {"0": 1, 0: 2}}, "cannot be flattened", id="keys without an order"),
        pytest.param({"misc": {"\ud800": np.ones(1)}}, "has a key", id="half a character"),
        pytest.param({"misc": {"f": jax.ShapeDtypeStruct((2,), jnp.float32)}}, "misc.f is abstract", id="abstract"),
    ],
)
def test_a_state_that_cannot_be_stored_is_refused_before_writing(tmp_path, state, message):
    with ct.open(ct.CheckpointSpec(directory=tmp_path)) as ckpt, pytest.raises(ct.LeafError, match=message):
        ckpt.save(1, state)
    assert not list(tmp_path.glob("[0-9]*"))


@pytest.mark.parametrize("make", [lambda: jnp.ones(3), lambda: jax.random.key(0)])
def test_a_donated_array_is_refused_by_name(tmp_path, make):
    donated = make()
    donated.delete()
    with ct.open(ct.CheckpointSpec(directory=tmp_path)) as ckpt:
        with pytest.raises(ct.LeafError, match=r"params\.w was deleted"):
            ckpt.save(1, {"params": {"w": donated}})
        assert ckpt.all_steps() == ()
