# SPDX-License-Identifier: Apache-2.0
"""Damaged files of a step are named; a disk that does not answer is not damage."""

import pytest

import ckpttools as ct
from ckpttools.store import catalogue, digest
from ckpttools.store.file_integrity import find_damaged_files


@pytest.fixture
def entry(golden):
    return next(entry for entry in catalogue.scan(golden).entries if entry.step == 2)


def test_every_byte_of_an_intact_step_is_read(entry):
    sizes = []
    assert find_damaged_files(entry, sizes.append) == ()
    assert sum(sizes) == entry.manifest.summary.total_bytes > 0


def test_changed_and_missing_files_are_named(entry):
    changed, missing = entry.path / "commit_success.txt", entry.path / "model" / "_METADATA"
    changed.write_bytes(changed.read_bytes()[::-1])
    missing.unlink()
    assert set(find_damaged_files(entry)) == {"commit_success.txt", "model/_METADATA"}


def test_a_directory_that_became_a_file_is_damage(entry):
    (entry.path / "model").rename(entry.path.parent / "elsewhere")
    (entry.path / "model").touch()
    damaged = find_damaged_files(entry)
    assert damaged
    assert all(name.startswith("model/") for name in damaged)


def test_a_file_that_cannot_be_read_is_not_damage(entry, monkeypatch):
    def refuse(algorithm, path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(digest, "hash_file", refuse)
    with pytest.raises(ct.StorageError, match="cannot be read") as caught:
        find_damaged_files(entry)
    assert not isinstance(caught.value, ct.StepDamagedError)
    assert "nothing was changed" in caught.value.fix
