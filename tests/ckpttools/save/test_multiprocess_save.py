# SPDX-License-Identifier: Apache-2.0
"""What the processes of one save compare and merge; `processes/test_messages.py` runs it with real processes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ckpttools as ct
from ckpttools.save import multiprocess_save, write_step
from ckpttools.tree import snapshot
from ckpttools.tree.records import Record


class Batches:
    def __init__(self, position):
        self.position = position

    def get_state(self):
        return {"position": self.position}

    def set_state(self, state):
        self.position = state["position"]


def take(state):
    return write_step.add_digests("xxh3", snapshot.take(state, None))


def collect(own, leader):
    fingerprints = [multiprocess_save._fingerprint_leaves("xxh3", each) for each in (own, leader)]
    return multiprocess_save._collect_local_items(own, *fingerprints)


def test_equal_states_store_nothing_of_their_own():
    state = {"model": {"w": np.arange(3), "name": "run"}, "data": Batches(1)}
    assert collect(take(state), take(state)) == {}


def test_values_that_differ_from_the_leaders_are_stored_whole():
    own = take({"model": {"w": np.arange(3), "b": np.zeros(2)}, "data": Batches(7)})
    leader = take({"model": {"w": np.arange(3) + 1, "b": np.zeros(2)}, "data": Batches(1)})
    found = collect(own, leader)
    (w,) = found["model"].records
    assert (w.path, w.digest) == (("w",), "")
    assert "bytes" in w.value
    assert list(found["data"].skeletons) == [()]
    assert [record.value for record in found["data"].records] == [7]


def test_states_with_other_leaves_are_refused():
    with pytest.raises(ct.StructureError, match="differ in 1 leaves"):
        collect(take({"model": {"w": 1, "extra": 2}}), take({"model": {"w": 1}}))


def test_values_too_large_for_the_manifest_are_refused(monkeypatch):
    monkeypatch.setattr(multiprocess_save, "_MAX_LOCAL_BYTES", 8)
    with pytest.raises(ct.LeafError, match="16 bytes of this process's state differ"):
        collect(take({"model": np.zeros(2)}), take({"model": np.ones(2)}))


def test_shards_that_do_not_cover_an_array_are_refused():
    leaf = snapshot.SnapshotLeaf(Record(path=("w",), kind="array", shape=(4,), dtype="float32"), jnp.zeros(4))
    assert isinstance(leaf.sharded_array, jax.Array)
    halves = {((0, 2),): "xxh3:1", ((2, 4),): "xxh3:2"}
    merged = multiprocess_save._add_slices("model", leaf, halves)
    assert merged.record.slices == tuple(halves.items())
    with pytest.raises(ct.ProcessError, match=r"the 1 shards of model\.w are not the whole array"):
        multiprocess_save._add_slices("model", leaf, {((0, 2),): "xxh3:1"})
