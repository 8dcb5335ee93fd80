# SPDX-License-Identifier: Apache-2.0
"""Leaves are compared with their digests; the files decide what an error of Orbax means."""

import numpy as np
import pytest

import ckpttools as ct
from ckpttools.store import catalogue, digest, leaf_integrity, orbax
from ckpttools.tree.records import Record


def record_of(name, array, **fields):
    digests = {"digest": digest.hash_array("xxh3", array)} if "slices" not in fields else {}
    return Record(path=(name,), kind="array", shape=array.shape, dtype=array.dtype.name, **digests, **fields)


def find_damaged(record, array):
    return list(leaf_integrity.find_damaged_leaves({"model": (record,)}, {"model": {record.path: array}}))


@pytest.fixture
def entry(golden):
    return next(entry for entry in catalogue.scan(golden).entries if entry.step == 2)


def get_records(entry):
    return {name: item.records for name, item in entry.manifest.contents.items.items()}


def test_a_leaf_with_one_changed_bit_is_named():
    array = np.arange(4.0)
    assert find_damaged(record_of("w", array), array) == [], "control"
    changed = array.copy()
    changed.view(np.uint8)[5] ^= 1
    assert find_damaged(record_of("w", array), changed) == ["model.w"]


def test_a_sharded_leaf_is_compared_shard_by_shard():
    array = np.arange(8.0).reshape(2, 4)
    parts = (((0, 2), (0, 1)), ((0, 2), (1, 4)))
    slices = tuple((part, digest.hash_array("xxh3", array[tuple(slice(*each) for each in part)])) for part in parts)
    assert find_damaged(record_of("w", array, slices=slices), array) == [], "control"
    changed = array.copy()
    changed[1, 3] = -1
    assert find_damaged(record_of("w", array, slices=slices), changed) == ["model.w"]
    assert find_damaged(record_of("w", array, slices=slices[:1]), array) == ["model.w"], "a shard without a digest"


@pytest.mark.parametrize(
    ("parts", "covered"),
    [
        pytest.param([((0, 2), (0, 3))], True, id="whole"),
        pytest.param([((0, 1), (0, 3)), ((1, 2), (0, 3))], True, id="two shards"),
        pytest.param([((0, 1), (0, 3))], False, id="a gap"),
        pytest.param([((0, 1), (0, 3)), ((0, 1), (0, 3))], False, id="one shard twice"),
        pytest.param([((0, 2), (0, 4))], False, id="outside"),
        pytest.param([((0, 6),)], False, id="other rank"),
    ],
)
def test_shards_must_cover_their_array(parts, covered):
    assert leaf_integrity.has_full_coverage([(part, "xxh3:0") for part in parts], (2, 3)) is covered


def test_verified_leaves_are_returned(entry):
    arrays = leaf_integrity.read_verified(entry, get_records(entry))
    assert arrays["optimizer"]["count",].tolist() == 2
    assert arrays["model"]["layers", 0, "kernel"].tolist() == [[0, 2, 4], [6, 8, 10]]


def test_damage_names_leaves_and_files(entry):
    (path,) = (entry.path / "optimizer" / "d").iterdir()
    other = next(entry.path.glob("optimizer/ocdbt.process_0/d/*"))
    path.write_bytes(bytes(len(path.read_bytes())))
    other.write_bytes(bytes(len(other.read_bytes())))
    with pytest.raises(ct.CorruptStepError, match="step 2 is corrupt") as caught:
        leaf_integrity.read_verified(entry, get_records(entry))
    assert caught.value.step == 2
    assert {path.relative_to(entry.path).as_posix()} <= set(caught.value.files)


def test_an_error_of_orbax_on_intact_files_is_not_damage(entry, monkeypatch):
    def fail(path, records):
        raise orbax.ReadError(ValueError("half way"))

    monkeypatch.setattr(orbax, "read", fail)
    with pytest.raises(ct.StorageError, match="although its files are intact"):
        leaf_integrity.read_verified(entry, get_records(entry))
    (entry.path / "commit_success.txt").write_text("x")  # control: now the files are damaged
    with pytest.raises(ct.CorruptStepError, match=r"Orbax could not read it \(ValueError\)"):
        leaf_integrity.read_verified(entry, get_records(entry))


def test_a_step_removed_during_a_read_is_incomplete(entry, monkeypatch):
    def vanish(path, records):
        path.rename(path.with_name("gone"))
        raise orbax.ReadError(FileNotFoundError("gone"))

    monkeypatch.setattr(orbax, "read", vanish)
    with pytest.raises(ct.IncompleteStepError, match="was removed while it was read"):
        leaf_integrity.read_verified(entry, get_records(entry))
