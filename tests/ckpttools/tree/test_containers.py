# SPDX-License-Identifier: Apache-2.0
"""Containers of unknown structure: both ways, and hostile skeletons."""

import pytest

import ckpttools as ct
from ckpttools.tree.containers import pack, unpack

from .round_trips import Iterator


def test_unpack_reverses_pack():
    value = {"a": [1, (2, {"b": None})], 3: {}, "c": []}
    skeleton, found = pack(value, ())
    assert unpack(skeleton, [leaf.value for leaf in found]) == value


@pytest.mark.parametrize(
    "skeleton", [5, {"set": []}, {"dict": [["a"]]}, "x", None, {"dict": [], "list": []}, {"dict": [[[1], 0]]}]
)
def test_invalid_skeletons_are_refused(skeleton):
    with pytest.raises(ct.CorruptStepError):
        unpack(skeleton, [1])


def test_skeletons_that_are_too_deep_are_refused():
    skeleton = 0
    for _ in range(200):
        skeleton = {"list": [skeleton]}
    with pytest.raises(ct.CorruptStepError, match="deeper"):
        unpack(skeleton, [1])


@pytest.mark.parametrize(
    "state",
    [
        pytest.param({"deep": None}, id="a state that holds itself"),
        pytest.param({1.5: "x"}, id="a float as a key"),
        pytest.param({"x": object()}, id="an object"),
    ],
)
def test_iterator_states_that_cannot_be_written_are_refused(tmp_path, state):
    if "deep" in state:
        state["deep"] = state
    with ct.open(ct.CheckpointSpec(directory=tmp_path)) as ckpt, pytest.raises(ct.LeafError) as caught:
        ckpt.save(1, {"data": Iterator(state)})
    assert caught.value.fix
