# SPDX-License-Identifier: Apache-2.0
"""A file of flax's is read as flax wrote it, or refused as a whole."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import serialization

import ckpttools as ct
from ckpttools.store.formats import flax_msgpack

TREE = {"w": jnp.arange(6.0).reshape(2, 3), "moments": [jnp.ones(2, jnp.bfloat16), (jnp.int8(7),)], "epoch": 4}


@pytest.fixture
def path(tmp_path):
    (tmp_path / "state.msgpack").write_bytes(serialization.to_bytes(TREE))
    return tmp_path / "state.msgpack"


def test_a_tree_is_read_with_its_values_and_dtypes(path):
    found = flax_msgpack.read(path)
    np.testing.assert_array_equal(found["w"], TREE["w"])
    # Lists and tuples became dicts when flax wrote them.
    assert found["moments"]["0"].dtype == jnp.bfloat16
    assert (found["moments"]["1"]["0"].item(), found["epoch"]) == (7, 4)


def test_each_leaf_is_described(path):
    assert sorted(flax_msgpack.describe(path)) == [
        ("default.epoch", (), ""),
        ("default.moments.0", (2,), "bfloat16"),
        ("default.moments.1.0", (), "int8"),
        ("default.w", (2, 3), "float32"),
    ]


@pytest.mark.parametrize(
    "damage",
    [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: b"\xc1" + data, lambda data: data + data],
    ids=["cut", "empty", "another byte first", "twice"],
)
def test_a_damaged_file_is_refused_with_its_name(path, damage):
    flax_msgpack.read(path)  # control
    path.write_bytes(damage(path.read_bytes()))
    for read in (flax_msgpack.read, flax_msgpack.describe):
        with pytest.raises(ct.StructureError, match=r"state\.msgpack cannot be read as a msgpack file") as caught:
            read(path)
        assert "use another step" in caught.value.fix


@pytest.mark.parametrize(
    "tree",
    [
        {"w": jnp.ones(2), "sharded": {"kernel": "//MPAPlaceholder:3"}},
        [jnp.ones(2)],
        jnp.ones(2),
    ],
    ids=["an array stored elsewhere", "a list", "an array"],
)
def test_a_file_with_a_part_of_the_state_is_refused(path, tree):
    path.write_bytes(serialization.msgpack_serialize(tree))
    with pytest.raises(ct.StructureError, match="does not contain its whole state") as caught:
        flax_msgpack.read(path)
    assert "restore_checkpoint" in caught.value.fix


def test_a_plain_string_is_not_taken_for_a_placeholder(path):
    """The control of the test above."""
    tree = {"name": "MPA", "kernel": jnp.ones(2)}
    path.write_bytes(serialization.msgpack_serialize(tree))
    assert flax_msgpack.read(path)["name"] == "MPA"
