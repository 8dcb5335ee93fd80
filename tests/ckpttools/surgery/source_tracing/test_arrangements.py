# SPDX-License-Identifier: Apache-2.0
"""A candidate has the form of the array that joining its leaves makes, or that they are taken from."""

import numpy as np
import pytest

from ckpttools.surgery.source_tracing.arrangements import list_fused, list_plain, list_stacked, list_transposed


def form(*shape):
    return "array", "float32", shape


def layers(*numbers, shape=(2, 3)):
    return [(("m", "layers", str(number), "w"), form(*shape)) for number in numbers]


def qkv(*shapes, names=("q", "k", "v")):
    return {("m", name, "w"): form(*shape) for name, shape in zip(names, shapes, strict=True)}


def transpose(array, detail):
    return array.transpose(detail.axes) if detail.axes else array


def test_layers_are_stacked_in_the_order_of_their_numbers():
    (candidate,) = list_stacked(layers(10, 9, 2, shape=()), are_wanted=False)
    assert (candidate.path, candidate.form[2]) == (("m", "layers", "w"), (3,))
    assert [path[2] for path in candidate.leaves] == ["2", "9", "10"]
    other_form = [*layers(0), *layers(1, shape=(4,))]
    assert list_stacked(other_form, are_wanted=False) == [], "control: one layer is not a stack"


def test_a_stack_has_the_form_of_its_layers_joined():
    found = list_stacked(layers(0, 1, 2, 3), are_wanted=False)
    assert {each.form[2] for each in found} == {(4, 2, 3), (2, 4, 3), (2, 3, 4), (4, 3, 2)}
    for each in found:
        assert transpose(np.stack([np.zeros((2, 3))] * 4, each.detail.axis), each.detail).shape == each.form[2]


def test_a_stored_stack_is_taken_apart_to_its_layers():
    found = list_stacked(layers(0, 1, 2, 3), are_wanted=True)
    assert len(found) == 4
    for each in found:
        layer = np.moveaxis(np.zeros(each.form[2]), each.detail.axis, 0)[0]
        assert transpose(layer, each.detail).shape == (2, 3)


def test_layers_of_the_state_are_counted_from_zero():
    assert list_stacked(layers(1, 2), are_wanted=True) == []
    assert list_stacked(layers(1, 2), are_wanted=False), "control: on disk they may begin anywhere"


@pytest.mark.parametrize("shapes", [((4, 4), (4, 4), (4, 4)), ((4, 6), (4, 2), (4, 2)), ((6,), (2,), (2,))])
def test_a_fused_array_has_the_form_of_its_pieces_merged(shapes):
    found = [each for each in list_fused(qkv(*shapes), are_wanted=False) if each.detail.pieces == ("q", "k", "v")]
    assert found
    for each in found:
        merged = np.concatenate([np.zeros(shape) for shape in shapes], each.detail.axis)
        assert transpose(merged, each.detail).shape == each.form[2]


@pytest.mark.parametrize("shapes", [((4, 4), (4, 4), (4, 4)), ((4, 6), (4, 2), (4, 2)), ((6,), (2,), (2,))])
def test_a_stored_fused_array_is_split_to_its_pieces(shapes):
    found = [each for each in list_fused(qkv(*shapes), are_wanted=True) if each.detail.pieces == ("q", "k", "v")]
    assert found
    for each in found:
        where = np.cumsum(each.detail.sizes)[:-1] if each.detail.sizes else 3
        pieces = np.split(np.zeros(each.form[2]), where, each.detail.axis)
        assert tuple(transpose(piece, each.detail).shape for piece in pieces) == shapes


def test_only_all_pieces_of_a_fused_array_count():
    two = qkv((4, 4), (4, 4), names=("q", "k"))
    assert list(list_fused(two, are_wanted=False)) == []
    assert list(list_fused(two | qkv((4, 4), names=("v",)), are_wanted=False)), "control"


def test_a_transposed_leaf_has_another_form():
    leaves = [(("m", "w"), form(2, 3)), (("m", "square"), form(2, 2)), (("m", "lr"), ("value", "", ()))]
    (candidate,) = list_transposed(leaves)
    assert (candidate.path, candidate.form[2], candidate.detail.axes) == (("m", "w"), (3, 2), (1, 0))
    assert [each.form for each in list_plain(leaves)] == [each for _, each in leaves], "control"
