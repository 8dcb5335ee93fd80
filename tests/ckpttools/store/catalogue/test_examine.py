# SPDX-License-Identifier: Apache-2.0
"""What a numbered directory is, and whether that has changed since it was listed."""

import shutil

import pytest

import ckpttools as ct
from ckpttools.store import catalogue, layout
from ckpttools.store.catalogue.examine import examine_path


@pytest.fixture
def run(tmp_path):
    with ct.open(ct.CheckpointSpec(directory=tmp_path / "run")) as ckpt:
        ckpt.save(1, {"count": 1})
        ckpt.save(2, {"count": 2})
    return tmp_path / "run"


def examine(run, step):
    return examine_path(run / str(step), step)


def test_the_state_of_a_directory_is_named(run):
    assert examine(run, 1).state == "committed"
    (run / "1" / layout.MANIFEST).write_bytes(b"{}")
    assert examine(run, 1).state == "corrupt"
    (run / "1" / layout.MANIFEST).unlink()
    assert examine(run, 1).state == "incomplete", "its second copy says that it was a step"
    (run / "3").write_text("")
    assert examine(run, 3) is None, "a file"


def test_damage_since_the_listing_is_seen_and_so_is_a_repair(run, tmp_path):
    shutil.copytree(run / "1", tmp_path / "copy")
    listed = examine(run, 1)
    assert not catalogue.is_damaged_now(listed)
    (run / "1" / layout.MANIFEST).write_bytes(b"{}")
    damaged = examine(run, 1)
    assert catalogue.is_damaged_now(listed)
    assert catalogue.is_still_damaged(damaged)
    assert not catalogue.is_intact_again(damaged)
    shutil.copyfile(tmp_path / "copy" / layout.MANIFEST, run / "1" / layout.MANIFEST)
    assert catalogue.is_intact_again(damaged)
    assert not catalogue.is_still_damaged(damaged)


def test_candidates_count_as_deleted_only_if_all_are_gone(run):
    both = [examine(run, 1), examine(run, 2)]
    shutil.rmtree(run / "1")
    assert not catalogue.were_deleted(both)
    shutil.rmtree(run / "2")
    assert catalogue.were_deleted(both)
    assert not catalogue.were_deleted([]), "control: nothing was listed"
