# SPDX-License-Identifier: Apache-2.0
"""Leaves are written as nested dicts, and read from the containers that another program has written."""

import jax.numpy as jnp
import numpy as np
import pytest
from orbax.checkpoint import v1

from ckpttools.store.formats.orbax_trees import build_trees, get_leaf, has_sequences, match_stored_containers, put_leaf
from ckpttools.tree import snapshot


@pytest.mark.parametrize("path", [(), ("a",), ("a", 0, "b")], ids=str)
def test_a_leaf_is_found_where_it_was_put(path):
    tree = {}
    put_leaf(tree, path, 5)
    assert get_leaf(tree, path) == 5


def test_an_item_without_arrays_has_no_tree():
    taken = snapshot.take({"model": {"layers": [np.ones(2)]}, "data": {"epoch": 3}}, None)
    trees = build_trees(taken, lambda leaf: leaf.array)
    assert list(trees) == ["model"]
    assert get_leaf(trees["model"], ("layers", 0)).tolist() == [1.0, 1.0]


def test_entries_of_lists_and_tuples_are_read_together():
    shape = np.empty(2)
    described = {"model": {"layers": [shape, shape], "w": shape}}
    wanted = {"model": {"layers": {"1": shape}, "w": shape}}
    (first, second) = match_stored_containers(described, wanted)["model"]["layers"]
    assert second is shape
    assert first.shape == (2,), "what was not requested"
    assert match_stored_containers({"model": {"w": shape}}, {"model": {"w": shape}}) == {}, "control: dicts only"
    assert match_stored_containers({}, wanted) == {}, "control: another tree"


def test_lists_are_seen_in_the_metadata_of_orbax(tmp_path):
    v1.save_checkpointables(tmp_path / "step", {"list": {"a": [jnp.ones(2)]}, "dict": {"a": jnp.ones(2)}})
    assert has_sequences(tmp_path / "step", ["list"])
    assert not has_sequences(tmp_path / "step", ["dict"]), "control"
    assert not has_sequences(tmp_path / "step", ["missing"])
