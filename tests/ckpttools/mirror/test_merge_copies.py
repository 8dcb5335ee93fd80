# SPDX-License-Identifier: Apache-2.0
"""Copies of a branch that was left are not restored; a run that continued elsewhere is."""

import dataclasses
import shutil

import ckpttools as ct
from tests.ckpttools.mirror.mirrors import STATE, restore, save, state_at


def test_an_abandoned_branch_is_not_restored_from_the_mirror(on_disk):
    save(on_disk, 1, 2, 3)
    with ct.open(on_disk) as ckpt:
        ckpt.restore(STATE, step=1)
        ckpt.save(2, state_at(2))
    assert restore(on_disk).step == 2
    shutil.rmtree(on_disk.directory)
    assert restore(on_disk).step == 2, "the copies of the branch that was left do not come back"


def test_a_run_continued_elsewhere_is_restored(on_disk, tmp_path):
    save(on_disk, 1, 2)
    elsewhere = dataclasses.replace(on_disk, directory=tmp_path / "elsewhere")
    assert restore(elsewhere).step == 2
    save(elsewhere, 3)
    assert restore(on_disk).step == 3


def test_newer_copies_of_an_abandoned_past_are_ignored(on_disk, tmp_path):
    """A machine lost its disk while the store did not answer; the run went on from an older step under its old name."""
    save(on_disk, 1)
    shutil.copytree(on_disk.directory, tmp_path / "backup")
    save(on_disk, 2, 3)
    shutil.rmtree(on_disk.directory)
    shutil.copytree(tmp_path / "backup", on_disk.directory)
    save(dataclasses.replace(on_disk, mirror=None), 2)
    assert restore(on_disk).step == 2
    shutil.rmtree(on_disk.directory / "2")
    assert restore(on_disk).step == 3, "the control: with step 1 alone the newer copy is the run"
