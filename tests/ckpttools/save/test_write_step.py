# SPDX-License-Identifier: Apache-2.0
"""One save: digests, files, and the errors that come out of it."""

import errno

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ckpttools as ct
from ckpttools.save import write_step
from ckpttools.store import digest
from ckpttools.tree import flatten, snapshot


def test_digests_are_added_to_arrays_and_not_to_plain_values():
    array = np.arange(4.0)
    taken = snapshot.take({"item": {"w": array, "name": "x"}}, None)
    digested = write_step.add_digests("xxh3", taken)
    name, w = sorted(digested.records["item"], key=lambda record: record.path)
    assert (name.digest, w.digest) == ("", digest.hash_array("xxh3", array))
    assert [record.digest for record in taken.records["item"]] == ["", ""], "the snapshot itself is not changed"


@pytest.mark.parametrize("asynchronous", [True, False], ids=["background", "blocking"])
def test_a_save_flattens_the_state_once(tmp_path, monkeypatch, asynchronous):
    calls, real = [], flatten.flatten_item
    monkeypatch.setattr(flatten, "flatten_item", lambda *args, **kwargs: calls.append(args) or real(*args, **kwargs))
    spec = ct.CheckpointSpec(directory=tmp_path, storage=ct.Storage(asynchronous=asynchronous))
    with ct.open(spec) as ckpt:
        ckpt.save(1, {"model": {"w": jnp.ones(2)}, "key": jax.random.key(0)})
        ckpt.wait()
    assert len(calls) == 2, "once for each item"


def test_known_files_are_hashed_again_if_their_size_changed(tmp_path):
    (tmp_path / "a").write_bytes(b"12")
    (tmp_path / "b").write_bytes(b"345")
    known = {"a": (2, "xxh3:known"), "b": (2, "xxh3:known")}
    files = write_step.describe_files(tmp_path, "xxh3", known)
    assert files == {"a": (2, "xxh3:known"), "b": (3, digest.hash_bytes("xxh3", b"345"))}


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        pytest.param(OSError(errno.ENOSPC, "full"), ct.DiskSpaceError, "free some space", id="full"),
        pytest.param(ValueError("x: No space left on device"), ct.DiskSpaceError, "free some space", id="wrapped"),
        pytest.param(OSError(errno.EIO, "I/O error"), ct.StorageError, "the next save tries again", id="other"),
        pytest.param(RuntimeError("cannot schedule after shutdown"), ct.StorageError, r"wait\(\) or close", id="exit"),
    ],
)
def test_an_error_of_the_disk_becomes_a_storage_error(tmp_path, error, kind, text):
    made = write_step.make_save_error(tmp_path, 3, error)
    assert type(made) is kind
    with pytest.raises(kind, match=text):
        raise made
