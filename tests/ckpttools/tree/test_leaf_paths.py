# SPDX-License-Identifier: Apache-2.0
"""Paths of leaves, as names and as strings."""

from ckpttools.tree.leaf_paths import format_leaf_name, is_below, to_names


def test_ints_and_strings_are_the_same_name():
    assert to_names(("layers", 0, "kernel")) == to_names(("layers", "0", "kernel")) == ("layers", "0", "kernel")


def test_a_leaf_is_shown_with_its_item():
    assert format_leaf_name("model", ("layers", 0, "kernel")) == "model.layers.0.kernel"
    assert format_leaf_name("step", ()) == "step"


def test_a_leaf_is_below_an_object_that_starts_its_path():
    assert is_below(("data", "0", "x"), [("data", 0)])
    assert is_below(("anything",), [()])
    assert not is_below(("data2", "x"), [("data",)])
    assert not is_below(("data", "x"), [])
