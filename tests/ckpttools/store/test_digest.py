# SPDX-License-Identifier: Apache-2.0
"""Digests: every byte of a file or array counts."""

import numpy as np
import pytest

import ckpttools as ct
from ckpttools.store import digest


@pytest.mark.parametrize("algorithm", ["xxh3", "sha256"])
@pytest.mark.parametrize("size", [0, 1, 99, 100, 101, 350])
def test_every_byte_counts_whatever_the_size(tmp_path, monkeypatch, algorithm, size):
    monkeypatch.setattr(digest, "_BUFFER_BYTES", 30)
    path, data = tmp_path / "file", bytearray(range(200)) + bytearray(150)
    path.write_bytes(data[:size])
    seen = {digest.hash_file(algorithm, path)}
    for position in range(size):
        changed = data[:size]
        changed[position] ^= 1
        path.write_bytes(changed)
        seen.add(digest.hash_file(algorithm, path))
    assert len(seen) == size + 1
    path.write_bytes(data[:size] + b"\0")
    assert digest.hash_file(algorithm, path) not in seen


def test_files_and_arrays_have_the_digest_of_their_bytes(tmp_path):
    array = np.arange(10.0)
    (tmp_path / "file").write_bytes(array.tobytes())
    expected = digest.hash_bytes("xxh3", array.tobytes())
    assert digest.hash_file("xxh3", tmp_path / "file") == digest.hash_array("xxh3", array) == expected
    assert digest.get_algorithm(expected) == "xxh3"


def test_an_unknown_algorithm_is_refused():
    with pytest.raises(ct.CorruptStepError, match="md5"):
        digest.hash_bytes("md5", b"")
