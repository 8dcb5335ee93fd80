# SPDX-License-Identifier: Apache-2.0
"""Copies of a branch that was left are not restored; a run that continued elsewhere is."""

import dataclasses
import shutil

import pytest

import ckpttools as ct
from tests.ckpttools.mirror.mirrors import STATE, changed, damage, restore, save, state_at


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


@pytest.mark.filterwarnings("ignore:.*damaged step.*were passed over")
@pytest.mark.parametrize("is_copied", [False, True])
def test_damage_does_not_return_a_run_to_a_left_branch(on_disk, is_copied):
    save(on_disk, 1, 2, 3)
    branch = on_disk if is_copied else dataclasses.replace(on_disk, mirror=None)
    with ct.open(branch) as ckpt:
        ckpt.restore(STATE, step=1)
        ckpt.save(2, state_at(2))
    damage(on_disk, 2)
    if is_copied:
        assert restore(on_disk).step == 2
        return
    assert restore(on_disk).step == 1
    assert restore(on_disk).step == 1, "the damaged step is in quarantine now"


@pytest.mark.filterwarnings("ignore:.*damaged step.*were passed over")
def test_a_copy_of_another_branch_does_not_replace_a_step(on_disk):
    save(on_disk, 1, 2, 3)
    with ct.open(dataclasses.replace(on_disk, mirror=None)) as ckpt:
        ckpt.restore(STATE, step=1)
        ckpt.save(2, state_at(-2))
    damage(on_disk, 2)
    with pytest.raises(ct.StepDamagedError):
        restore(on_disk, step=2)
    assert restore(on_disk, step=3).step == 3, "a superseded step is restored on request"


def test_the_mirror_keeps_the_base_until_two_steps_follow_it(on_disk):
    spec = changed(dataclasses.replace(on_disk, keep=ct.All()), keep=ct.Latest(1))
    save(spec, 1, 2, 3, 4)
    with ct.open(spec) as ckpt:
        ckpt.restore(STATE, step=2)
        ckpt.save(3, state_at(30))
    assert ckpt.mirror_status.copied == (2, 3, 3, 4), "the base, and the two newest steps of each branch"
    with ct.open(spec) as ckpt:
        ckpt.restore(STATE)
        ckpt.save(4, state_at(40))
        ckpt.save(5, state_at(50))
    assert ckpt.mirror_status.copied == (4, 5)
    assert len(ct.ls(spec.directory)) == 7, "the run itself keeps everything"
