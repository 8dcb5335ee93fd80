# SPDX-License-Identifier: Apache-2.0
"""A restore uses the nearest intact copy, whatever happened to the local disk."""

import dataclasses
import os
import shutil

import numpy as np
import pytest

import ckpttools as ct
from ckpttools.mirror import remote_store
from ckpttools.store import layout
from ckpttools.store.run_directory import RunDirectory
from tests.ckpttools.mirror.mirrors import (
    STATE,
    changed,
    damage,
    nas,
    restore,
    restore_offline,
    save,
    state_at,
    wait_for,
)
from tests.ckpttools.restore.test_first_intact import flip_bit, largest_file


def test_a_truncated_object_on_s3_is_found_and_skipped(on_s3, s3, request):
    save(on_s3, 1, 2, 3)
    objects = s3.objects(request.node.name)
    largest = max((key for key in objects if "/3-" in key), key=objects.__getitem__)
    s3.truncate(largest)
    damage(on_s3, 3)
    report = restore(on_s3)
    assert report.step == 2
    assert report.damaged == 1
    verdicts = [(each.step, each.source, each.verdict) for each in report.candidates]
    assert verdicts == [(3, "local", "corrupt"), (3, "mirror", "corrupt"), (2, "local", "used")]
    assert report.candidates[1].files == (largest.split("/", 2)[2],)
    assert not list(layout.get_control_path(on_s3.directory, "staging").iterdir()), "rejected copies are removed"


def test_a_connection_cut_during_a_fetch_raises_or_falls_back(on_s3, way):
    save(on_s3, 1, 2)
    shutil.rmtree(on_s3.directory / "2")
    way.bytes_left = 4_000
    assert restore_offline(on_s3) == 1
    shutil.rmtree(on_s3.directory / "1")
    way.bytes_left, way.open = 4_000, True
    with pytest.raises(ct.MirrorError, match="could not be"):
        restore(on_s3)
    way.bytes_left, way.open = None, True
    assert restore(on_s3).step == 2


def test_an_unreachable_store_never_means_a_fresh_start(on_s3, way):
    way.open = False
    with ct.open(on_s3) as ckpt, pytest.raises(ct.MirrorError, match="holds no steps, and the mirror does not answer"):
        ckpt.restore(STATE)
    relaxed = changed(on_s3, must_answer=False)
    with ct.open(relaxed) as ckpt:
        with pytest.warns(ct.CheckpointWarning, match="only local steps were considered"):
            report = ckpt.restore(STATE)
        assert report.step is None
        assert "could not be listed" in report.mirror_error
        assert report.as_dict()["mirror_error"] == report.mirror_error


def test_without_a_mirror_an_empty_directory_restores_nothing(on_disk):
    """Control: nothing but the mirror restores the run."""
    save(on_disk, 1)
    shutil.rmtree(on_disk.directory)
    assert restore(dataclasses.replace(on_disk, mirror=None)).step is None
    assert restore(on_disk).step == 1


def test_a_damaged_local_step_is_fetched(on_disk):
    save(on_disk, 1, 2)
    damage(on_disk, 2)
    report = restore(on_disk)
    assert report.step == 2
    assert [(each.source, each.verdict) for each in report.candidates] == [("local", "corrupt"), ("mirror", "used")]
    assert report.candidates[0].moved_to == layout.get_control_path(on_disk.directory, "quarantine") / "2"
    assert ct.verify(on_disk.directory).ok
    damage(on_disk, 2)
    assert restore(on_disk, step=2).step == 2, "asked for by number"
    shutil.rmtree(on_disk.directory / "2")
    assert restore(on_disk, step=2).step == 2
    assert layout.get_spare_directory(on_disk.directory, 2).is_dir(), "with its second copies"


def test_a_requested_step_that_is_intact_nowhere_raises(on_disk):
    save(on_disk, 1, 2)
    damage(on_disk, 2)
    flip_bit(largest_file(nas(on_disk, 2)))
    with pytest.raises(ct.CorruptStepError, match="step 2 is corrupt"):
        restore(on_disk, step=2)
    with pytest.raises(ct.StepNotFoundError, match="here and at the mirror"):
        restore(on_disk, step=7)
    damage(on_disk, 1)
    flip_bit(largest_file(nas(on_disk, 1)))
    with pytest.raises(ct.NoIntactStepError, match="step 1 from the mirror: corrupt"):
        restore(on_disk)


def test_the_best_step_may_be_at_the_mirror(on_disk):
    spec = dataclasses.replace(on_disk, keep=ct.Latest(2), mirror=dataclasses.replace(on_disk.mirror, keep=ct.All()))
    with ct.open(spec) as ckpt:
        for step, loss in ((1, 0.1), (2, 0.5), (3, 0.4)):
            ckpt.save(step, state_at(step), metrics={"loss": loss})
            ckpt.wait()
            wait_for(lambda step=step: step in ckpt.mirror_status.copied)
    assert [row.step for row in ct.ls(spec.directory)] == [2, 3]
    assert restore(spec, step=ct.best("loss", mode="min")).step == 1
    assert restore(spec).step == 3


def test_nothing_is_fetched_through_a_link_outside_the_run(on_disk, tmp_path):
    save(on_disk, 1)
    shutil.rmtree(on_disk.directory / "1")
    shutil.rmtree(layout.get_control_path(on_disk.directory, "staging"))
    (tmp_path / "outside").mkdir()
    layout.get_control_path(on_disk.directory, "staging").symlink_to(tmp_path / "outside")
    with pytest.raises(ct.StorageError, match="is a link"):
        restore(on_disk)
    assert not list((tmp_path / "outside").iterdir())


def test_a_fetch_without_enough_disk_space_raises(on_disk, monkeypatch):
    save(on_disk, 1)
    shutil.rmtree(on_disk.directory)
    usage = type(shutil.disk_usage("/"))(total=100, used=99, free=1)
    with monkeypatch.context() as patched, ct.open(on_disk) as ckpt:
        patched.setattr(shutil, "disk_usage", lambda path: usage)
        with pytest.raises(ct.DiskSpaceError, match="at the mirror takes"):
            ckpt.restore(STATE)


def test_a_disk_that_refuses_a_fetch_raises(on_disk, monkeypatch):
    save(on_disk, 1)
    shutil.rmtree(on_disk.directory)

    def refuse(*args, **options):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(remote_store.RemoteStore, "_fetch_file", refuse)
    with pytest.raises(ct.StorageError, match="could not be fetched from the mirror"):
        restore(on_disk)


def test_a_reader_beside_a_writer_fetches_and_leaves_nothing(on_disk):
    save(on_disk, 1, 2)
    shutil.rmtree(on_disk.directory / "2")
    with ct.open(on_disk) as writer:
        writer.restore(STATE, step=1)
        writer.steps(9)
        with ct.open(dataclasses.replace(on_disk)) as reader:
            assert reader.restore(STATE).step == 2
        assert not (on_disk.directory / "2").exists()
        assert not list(layout.get_control_path(on_disk.directory, "staging").iterdir())


def test_a_fetch_that_cannot_commit_raises_and_loses_nothing(on_disk, monkeypatch):
    save(on_disk, 1, 2, 3)
    rename = os.rename

    def refuse(source, target):
        if "staging" in str(source):
            raise OSError(28, "No space left on device")
        rename(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(os, "rename", refuse)
        damage(on_disk, 3)
        with pytest.warns(ct.CheckpointWarning, match="step 3 was restored from the mirror, where it stays"):
            assert restore(on_disk).step == 3
        shutil.move(layout.get_control_path(on_disk.directory, "quarantine") / "3", on_disk.directory / "3")
        with pytest.raises(ct.StorageError, match="step 3 was fetched but cannot be committed"):
            ct.fetch_step(on_disk.directory, on_disk.mirror, 3)
    assert [row.step for row in ct.ls(on_disk.directory)] == [1, 2, 3], "the local step is where it was"
    assert not list(layout.get_control_path(on_disk.directory, "quarantine").iterdir())
    assert ct.fetch_step(on_disk.directory, on_disk.mirror, 3) == 3, "control"
    assert [path.name for path in layout.get_control_path(on_disk.directory, "quarantine").iterdir()] == ["3"]


def test_a_copy_does_not_replace_a_step_saved_meanwhile(on_disk):
    save(on_disk, 1, 2, 3)
    damage(on_disk, 3)

    def save_again():
        local = dataclasses.replace(on_disk, mirror=None)
        with ct.open(local) as other:
            assert other.restore(STATE).step == 2
            other.save(3, state_at(7))

    hooks = [save_again]
    with ct.open(on_disk, lambda state: hooks.pop()() if hooks else None) as reader:
        assert reader.restore(STATE).step == 3, "the copy at the mirror"
    found = ct.load(on_disk.directory, STATE, step=3).state
    np.testing.assert_array_equal(found["model"]["w"], state_at(7)["model"]["w"])


def test_opening_a_run_leaves_what_a_reader_is_fetching(on_disk, monkeypatch):
    save(on_disk, 1, 2)
    shutil.rmtree(on_disk.directory / "2")
    fetch_file = remote_store.RemoteStore._fetch_file
    staging = layout.get_control_path(on_disk.directory, "staging")

    def open_meanwhile(*args, **options):
        with RunDirectory(on_disk.directory).hold_for_writing():
            pass
        return fetch_file(*args, **options)

    (staging / "left-by-a-kill").mkdir(parents=True)
    monkeypatch.setattr(remote_store.RemoteStore, "_fetch_file", open_meanwhile)
    assert restore(on_disk).step == 2
    assert not list(staging.iterdir()), "control: all else is removed"
