# SPDX-License-Identifier: Apache-2.0
"""A full, slow or failing disk: detected in advance if possible, else reported at once; no old step is lost."""

import collections
import os
import shutil
import threading
import time

import jax.numpy as jnp
import numpy as np
import pytest

import ckpttools as ct
from ckpttools.store import commit, orbax

STATE = {"model": {"w": jnp.arange(1000.0)}}
Usage = collections.namedtuple("Usage", "total used free")


def spec_for(directory, **storage):
    return ct.CheckpointSpec(directory=directory, keep=ct.Latest(2), storage=ct.Storage(**storage))


def with_free(monkeypatch, free):
    monkeypatch.setattr("shutil.disk_usage", lambda _path: Usage(10**12, 0, free() if callable(free) else free))


def test_too_little_space_raises_before_anything_is_written(tmp_path, monkeypatch):
    with ct.open(spec_for(tmp_path)) as ckpt:
        with_free(monkeypatch, 2_000_000)
        with pytest.raises(ct.DiskSpaceError, match="2,000,000 bytes free; this save takes 1,052,576"):
            ckpt.save(1, STATE)
    assert not (tmp_path / ".ckpttools" / "staging").exists()


def test_with_prune_steps_that_retention_allows_are_deleted_first(tmp_path, monkeypatch):
    with ct.open(spec_for(tmp_path)) as ckpt:
        for step in (1, 2):
            ckpt.save(step, STATE)
    keep_all = ct.CheckpointSpec(directory=tmp_path, keep=ct.All())
    with ct.open(keep_all) as ckpt:
        ckpt.restore(STATE)
        ckpt.save(3, STATE)
    with ct.open(spec_for(tmp_path, when_full="prune")) as ckpt:
        ckpt.restore(STATE)
        with_free(monkeypatch, lambda: 10**9 if not (tmp_path / "1").exists() else 0)
        ckpt.save(4, STATE)
        ckpt.wait()
        with_free(monkeypatch, 0)
        with pytest.raises(ct.DiskSpaceError):
            ckpt.save(5, STATE)
        assert ckpt.all_steps() == (3, 4)


def test_a_full_disk_leaves_the_old_steps_and_no_leftovers(tmp_path, monkeypatch):
    with ct.open(spec_for(tmp_path)) as ckpt:
        ckpt.save(1, STATE)
        ckpt.wait()

        def fail_half_way(directory, *_args, **_kwargs):
            directory.mkdir(parents=True)
            (directory / "half").write_bytes(b"x" * 1000)
            raise ValueError("RESOURCE_EXHAUSTED: Error writing: No space left on device")

        monkeypatch.setattr(orbax, "write", fail_half_way)
        ckpt.save(2, STATE)
        with pytest.raises(ct.DiskSpaceError, match="step 2"):
            ckpt.wait()
        assert ckpt.all_steps() == (1,)
        assert not list((tmp_path / ".ckpttools" / "staging").iterdir())
    monkeypatch.undo()
    with ct.open(spec_for(tmp_path)) as ckpt:
        assert ckpt.restore(STATE).step == 1


def test_a_failed_save_does_not_count_as_saved(tmp_path, monkeypatch):
    def fail(*_args, **_kwargs):
        raise OSError(5, "Input/output error")

    spec = ct.CheckpointSpec(directory=tmp_path, save=ct.OnImprovement("loss", mode="min"))
    with ct.open(spec) as ckpt:
        monkeypatch.setattr(orbax, "write", fail)
        ckpt.step(1, STATE, metrics={"loss": 0.1})
        with pytest.raises(ct.StorageError, match="Input/output error"):
            ckpt.wait()
        monkeypatch.undo()
        # Worse than the one that was lost, and still the best saved one.
        assert isinstance(ckpt.step(2, STATE, metrics={"loss": 0.2}), ct.Started)


def test_a_save_whose_wait_timed_out_is_not_committed(tmp_path, monkeypatch):
    real = orbax.write

    def slow(*args, **kwargs):
        time.sleep(0.5)
        real(*args, **kwargs)

    monkeypatch.setattr(orbax, "write", slow)
    with ct.open(spec_for(tmp_path, asynchronous=False, timeout_s=0.05)) as ckpt:
        with pytest.raises(ct.SaveTimeoutError, match=r"has not ended after 0\.05 s"):
            ckpt.save(1, STATE)
        time.sleep(1.0)
        with pytest.warns(ct.CheckpointWarning, match="was not committed"):
            ckpt.wait()
        assert ckpt.latest_step() is None


def test_a_save_that_outlives_its_session_holds_the_lock(tmp_path, monkeypatch):
    real, proceed, ended = orbax.write, threading.Event(), threading.Event()

    def blocked(*args, **kwargs):
        proceed.wait(20)
        real(*args, **kwargs)
        ended.set()

    monkeypatch.setattr(orbax, "write", blocked)
    ckpt = ct.open(spec_for(tmp_path, timeout_s=0.05))
    ckpt.save(1, STATE)
    with pytest.raises(ct.SaveTimeoutError):
        ckpt.close()
    with ct.open(spec_for(tmp_path)) as other, pytest.raises(ct.RunInUseError):
        other.save(2, STATE)
    proceed.set()
    assert ended.wait(20)
    monkeypatch.undo()
    for _ in range(200):  # the lock is released shortly after the last byte
        with ct.open(spec_for(tmp_path)) as other:
            try:
                other.restore(STATE)
                other.save(2, STATE)
                break
            except ct.RunInUseError:
                time.sleep(0.05)
    assert [step.step for step in ct.ls(tmp_path)][-1] == 2


def test_a_readback_finds_a_disk_that_changes_bytes(tmp_path, monkeypatch):
    spec = ct.CheckpointSpec(directory=tmp_path, integrity=ct.Integrity(verify="readback"))
    with ct.open(spec) as ckpt:
        ckpt.save(1, STATE)
        ckpt.wait()
        real = orbax.write

        def bad_disk(directory, *args, **kwargs):
            real(directory, *args, **kwargs)
            path = max((p for p in directory.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
            data = bytearray(path.read_bytes())
            data[len(data) // 2] ^= 1
            path.write_bytes(data)

        monkeypatch.setattr(orbax, "write", bad_disk)
        ckpt.save(2, STATE)
        with pytest.raises(ct.CorruptStepError, match="step 2"):
            ckpt.wait()
        assert ckpt.all_steps() == (1,)


def test_a_background_save_stores_what_was_passed(tmp_path):
    """The arrays may change as soon as `save` returns."""
    array = np.zeros(200_000)
    with ct.open(spec_for(tmp_path)) as ckpt:
        ckpt.save(1, {"model": {"w": array}})
        array[:] = 1
        ckpt.wait()
        ckpt.save(2, {"model": {"w": array}})
        array[:] = 2
    with ct.open(spec_for(tmp_path)) as ckpt:
        assert ckpt.restore({"model": {"w": array}}, step=1).state["model"]["w"].max() == 0
        assert ckpt.restore({"model": {"w": array}}, step=2).state["model"]["w"].min() == 1


def _bad_sector(monkeypatch, place):
    real = os.lstat

    def lstat(path, *args, **kwargs):
        if place in str(path):
            raise OSError(5, "Input/output error", str(path))
        return real(path, *args, **kwargs)

    monkeypatch.setattr(os, "lstat", lstat)


def test_an_unreadable_step_hides_no_other_and_raises_if_newest(tmp_path, monkeypatch):
    with ct.open(spec_for(tmp_path)) as ckpt:
        for step in (1, 2):
            ckpt.save(step, STATE)
    _bad_sector(monkeypatch, f"{tmp_path}/1/model/")
    assert [(row.step, row.state) for row in ct.ls(tmp_path)] == [(2, "committed"), (1, "unreadable")]
    with ct.open(spec_for(tmp_path)) as ckpt:
        assert ckpt.restore(STATE).step == 2
        ckpt.save(3, STATE)
        ckpt.wait()
    assert (tmp_path / "1").is_dir(), "retention does not delete what cannot be read"
    monkeypatch.undo()
    _bad_sector(monkeypatch, f"{tmp_path}/3/model/")
    with ct.open(spec_for(tmp_path)) as ckpt:
        with pytest.raises(ct.StorageError, match="step 3 cannot be read"):
            ckpt.restore(STATE)
        assert ckpt.restore(STATE, step=2).step == 2


def test_an_undeletable_step_does_not_fail_the_save(tmp_path, monkeypatch):
    with ct.open(spec_for(tmp_path, asynchronous=False)) as ckpt:
        for step in (1, 2):
            ckpt.save(step, STATE)

        def refuse(*_args):
            raise OSError(5, "Input/output error")

        monkeypatch.setattr("ckpttools.store.commit.move_to_trash", refuse)
        with pytest.warns(ct.CheckpointWarning, match="step 3 is saved; old steps could not be deleted: step 1"):
            saved = ckpt.save(3, STATE)
        assert isinstance(saved, ct.Saved)
        assert "Input/output error" in saved.trouble
        monkeypatch.undo()
        assert ckpt.save(4, STATE).deleted == (1, 2)


def test_steps_deleted_by_hand_do_not_count_for_retention(tmp_path):
    with ct.open(spec_for(tmp_path, asynchronous=False)) as ckpt:
        for step in (1, 2, 3):
            ckpt.save(step, STATE)
        shutil.rmtree(tmp_path / "3")
        assert ckpt.save(4, STATE).deleted == ()
        assert ckpt.all_steps() == (2, 4)


def test_retention_deletes_a_step_copied_from_another_run(tmp_path):
    for run, steps in (("one", (1, 2, 3)), ("other", (10, 20, 30))):
        with ct.open(ct.CheckpointSpec(directory=tmp_path / run, keep=ct.All())) as ckpt:
            for step in steps:
                ckpt.save(step, STATE)
    shutil.copytree(tmp_path / "other" / "10", tmp_path / "one" / "10")
    with ct.open(spec_for(tmp_path / "one", asynchronous=False)) as ckpt:
        ckpt.restore(STATE)
        assert set(ckpt.save(40, STATE).deleted) == {1, 2}
        assert set(ckpt.save(50, STATE).deleted) == {3, 10}, "40 and 50 have passed it, as a step of a left branch"


def _unlisted(monkeypatch, place):
    real = os.scandir

    def scandir(path="."):
        if str(path).endswith(place):
            raise OSError(24, "Too many open files", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)


def test_an_unlistable_directory_during_orbaxs_merge_fails_the_save(tmp_path, monkeypatch):
    with ct.open(spec_for(tmp_path, asynchronous=False)) as ckpt:
        ckpt.save(1, STATE)
        _unlisted(monkeypatch, "2.orbax-checkpoint-tmp/model")
        with pytest.raises(ct.StorageError, match="without the index"):
            ckpt.save(2, STATE)
        assert ckpt.all_steps() == (1,)
        monkeypatch.undo()
        ckpt.save(2, STATE)
        assert ct.verify(tmp_path).ok


def test_an_unlistable_directory_is_not_described_as_empty(tmp_path, monkeypatch):
    with ct.open(spec_for(tmp_path, asynchronous=False)) as ckpt:
        ckpt.save(1, STATE)
        _unlisted(monkeypatch, "ocdbt.process_0/d")
        with pytest.raises(ct.StorageError, match="Too many open files"):
            ckpt.save(2, STATE)
        assert ckpt.all_steps() == (1,)


def test_an_unconfirmed_commit_is_reported_and_counted_once(tmp_path, monkeypatch):
    with ct.open(spec_for(tmp_path, asynchronous=False)) as ckpt:
        ckpt.save(1, STATE)
        real = commit.sync_file

        def refuse(path):
            if path == tmp_path:
                raise OSError(5, "Input/output error")
            real(path)

        monkeypatch.setattr(commit, "sync_file", refuse)
        with pytest.raises(ct.StorageError, match="step 2 is in its place"):
            ckpt.save(2, STATE)
        monkeypatch.undo()
        assert isinstance(ckpt.save(2, STATE), ct.Skipped)
        assert ckpt.save(3, STATE).deleted == (1,)


@pytest.mark.filterwarnings("ignore:.*damaged step.*were passed over")
def test_pruning_empties_quarantine_before_deleting_intact_steps(tmp_path, monkeypatch):
    keep_all = ct.CheckpointSpec(directory=tmp_path, keep=ct.All(), storage=ct.Storage(asynchronous=False))
    with ct.open(keep_all) as ckpt:
        for step in (1, 2, 3, 4):
            ckpt.save(step, STATE)
    data = max((tmp_path / "4" / "model").rglob("d/*"), key=lambda path: path.stat().st_size)
    middle = data.stat().st_size // 2
    damaged = bytearray(data.read_bytes())
    damaged[middle] ^= 1
    data.write_bytes(damaged)
    with ct.open(spec_for(tmp_path, when_full="prune", asynchronous=False)) as ckpt:
        assert ckpt.restore(STATE).step == 3
        with_free(monkeypatch, 10**9)
        ckpt.save(5, STATE)
        quarantined = tmp_path / ".ckpttools" / "quarantine" / "4"
        assert quarantined.is_dir()
        with_free(monkeypatch, lambda: 0 if quarantined.exists() else 10**9)
        ckpt.save(6, STATE)
        assert not quarantined.exists()
