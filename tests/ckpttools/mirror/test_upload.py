# SPDX-License-Identifier: Apache-2.0
"""Every committed step reaches the mirror, whatever the store does."""

import dataclasses
import gc
import shutil
import threading
import time
import warnings

import pytest

import ckpttools as ct
from ckpttools.mirror import remote_store
from ckpttools.store import layout
from ckpttools.store.manifest import Manifest, Summary
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
from tests.ckpttools.restore.test_first_intact import largest_file


def test_every_step_is_copied_to_s3_and_restored_from_there(on_s3, s3, request):
    status, warned = save(on_s3, 1, 2)
    assert status.ok
    assert status.copied == (1, 2)
    assert not warned
    objects = s3.objects(request.node.name)
    names = {key.split("/")[1] for key in objects}
    assert {name.split("-")[0] for name in names} == {"1", "2"}
    assert sum(key.endswith(layout.MANIFEST) for key in objects) == 2
    shutil.rmtree(on_s3.directory)
    report = restore(on_s3)
    assert report.step == 2
    assert [(each.step, each.source, each.verdict) for each in report.candidates] == [(2, "mirror", "used")]
    assert "step 2 from the mirror: used" in str(report)
    assert ct.verify(on_s3.directory).ok, "a fetched step is like any other"
    again = restore(on_s3)
    assert [each.source for each in again.candidates] == ["local"], "the nearest copy"
    assert save(on_s3, 3)[0].copied == (1, 2, 3), "the run continues from there"
    assert [row.branch for row in ct.ls(on_s3.directory)] == [ct.ls(on_s3.directory)[0].branch] * 2


def test_a_connection_cut_half_way_never_stops_training(on_s3, way, s3, request):
    save(on_s3, 1)
    way.bytes_left = 12_000
    status, warned = save(on_s3, 2, 3)
    assert not status.ok
    assert status.failures >= 1
    assert set(status.pending) >= {2}
    assert any("the mirror is not up to date" in text for text in warned)
    assert any("the next session does" in text for text in warned)
    assert restore_offline(on_s3) == 3
    finished = [key for key in s3.objects(request.node.name) if key.endswith(layout.MANIFEST)]
    unfinished = {key.split("/")[1] for key in s3.objects(request.node.name)} - {key.split("/")[1] for key in finished}
    assert unfinished, "the cut came in the middle of a copy"
    way.bytes_left, way.open = None, True
    status, warned = save(on_s3, 4)
    assert status.ok
    assert status.copied == (2, 3, 4)
    assert not warned


def test_a_store_that_refuses_deletions_is_reported_once(on_disk, monkeypatch):
    def refuse(store, name):
        raise ct.MirrorError(what="no right to delete.")

    monkeypatch.setattr(remote_store.RemoteStore, "delete", refuse)
    spec = dataclasses.replace(on_disk, keep=ct.All(), mirror=dataclasses.replace(on_disk.mirror, keep=ct.Latest(2)))
    status, warned = save(spec, 1, 2, 3, 4, 5)
    assert set(status.copied) >= {4, 5}
    assert "no right to delete" in status.error
    assert status.failures >= 1
    assert sum("no right to delete" in text for text in warned) == 1
    monkeypatch.undo()
    status, warned = save(spec, 6)
    assert status.ok
    assert status.copied == (5, 6)


def test_the_mirror_applies_its_own_retention(on_disk):
    spec = dataclasses.replace(on_disk, keep=ct.All(), mirror=dataclasses.replace(on_disk.mirror, keep=ct.Latest(2)))
    assert save(spec, 1, 2, 3, 4)[0].copied == (3, 4)
    assert [row.step for row in ct.ls(spec.directory)] == [1, 2, 3, 4]


def test_an_unfinished_copy_is_ignored_and_resumed(on_disk):
    save(on_disk, 1, 2)
    copy = nas(on_disk, 2)
    (copy / layout.MANIFEST).unlink()
    data = largest_file(copy)
    data.write_bytes(data.read_bytes()[:10])
    shutil.move(on_disk.directory, on_disk.directory.with_name("aside"))
    assert restore(on_disk).step == 1
    shutil.rmtree(on_disk.directory)
    shutil.move(on_disk.directory.with_name("aside"), on_disk.directory)
    assert save(on_disk, 3)[0].copied == (1, 2, 3)
    damage(on_disk, 2)
    assert restore(on_disk, step=2).step == 2


def test_leftovers_of_deleted_steps_are_removed(on_disk):
    save(on_disk, 1)
    left = nas(on_disk, 1).with_name("7-0123abcd")
    left.mkdir()
    (left / "piece").write_text("x")
    stranger = left.with_name("notes")
    stranger.mkdir()
    (stranger / "mine").write_text("x")
    save(on_disk, 2)
    assert not left.exists()
    assert (stranger / "mine").exists(), "other names are not touched"


def test_damage_is_not_copied(on_disk):
    plain = dataclasses.replace(on_disk, mirror=None)
    save(plain, 1, 2)
    damage(on_disk, 1)
    status, warned = save(on_disk, 3)
    assert status.damaged == (1,)
    assert status.copied == (2, 3)
    assert any("step 1 is not copied to the mirror" in text for text in warned)
    assert not status.ok
    assert "damaged 1" in str(status)


def test_steps_of_another_run_at_the_address_stay(on_disk, tmp_path):
    save(on_disk, 1, 2)
    other = dataclasses.replace(changed(on_disk, keep=ct.Latest(1)), directory=tmp_path / "other")
    status, warned = save(other, 5, 6, 7)
    assert set(status.copied) == {1, 2, 6, 7}
    assert any("2 step(s) of another run" in text for text in warned)
    assert restore(other).step == 7
    assert restore(on_disk).step == 2


def test_a_step_deleted_during_its_upload_is_copied_whole(on_disk, monkeypatch):
    started, go_on = threading.Event(), threading.Event()
    send = remote_store.RemoteStore._upload_file

    def slow(store, source, name, file):
        started.set()
        if name.startswith("1-"):
            go_on.wait(20)
        send(store, source, name, file)

    monkeypatch.setattr(remote_store.RemoteStore, "_upload_file", slow)
    spec = dataclasses.replace(on_disk, keep=ct.Latest(2), mirror=dataclasses.replace(on_disk.mirror, keep=ct.All()))
    with ct.open(spec) as ckpt:
        ckpt.save(1, state_at(1))
        ckpt.wait()
        assert started.wait(20)
        for step in (2, 3, 4):
            ckpt.save(step, state_at(step))
            ckpt.wait()
        assert not (spec.directory / "1").exists()
        go_on.set()
        wait_for(lambda: 4 in ckpt.mirror_status.copied and not ckpt.mirror_status.pending)
        assert ckpt.mirror_status.copied == (1, 3, 4)
        assert ckpt.mirror_status.missed == (2,)
        with pytest.warns(ct.CheckpointWarning, match=r"deleted step\(s\) 2 before they were copied"):
            ckpt.step(5, STATE)
    assert restore(spec, step=1).step == 1
    assert not list(layout.get_control_path(spec.directory, "outbox").iterdir())


def count_live_summaries():
    gc.collect()
    return sum(isinstance(each, Summary) for each in gc.get_objects())


def test_a_slow_mirror_uses_bounded_memory_and_catches_up(on_disk, monkeypatch):
    started, go_on = threading.Event(), threading.Event()
    send = remote_store.RemoteStore._upload_file

    def slow(store, source, name, file):
        started.set()
        assert go_on.wait(60)
        send(store, source, name, file)

    monkeypatch.setattr(remote_store.RemoteStore, "_upload_file", slow)
    spec = dataclasses.replace(
        on_disk, keep=ct.Latest(2), mirror=dataclasses.replace(on_disk.mirror, keep=ct.Latest(3))
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with ct.open(spec) as ckpt:
            alive = []
            for step in range(1, 25):
                ckpt.save(step, state_at(step))
                ckpt.wait()
                assert started.wait(20)
                alive.append(count_live_summaries())
            assert alive[-1] <= alive[4], "what waits does not grow with the steps"
            assert [path.name[0] for path in layout.get_control_path(spec.directory, "outbox").iterdir()] == ["1"]
            assert ckpt.mirror_status.pending == (23, 24)
            assert ckpt.mirror_status.missed == (22,)
            go_on.set()
    assert ckpt.mirror_status.copied == (1, 23, 24)
    assert ckpt.mirror_status.pending == ()
    texts = [str(each.message) for each in caught]
    assert not any("the next session" in text for text in texts)
    assert sum("step(s) 22 before they were copied" in text for text in texts) == 1
    shutil.rmtree(spec.directory)
    assert restore(spec).step == 24


def test_a_mirror_of_many_steps_holds_only_summaries(on_disk):
    spec = dataclasses.replace(on_disk, keep=ct.Latest(2), mirror=dataclasses.replace(on_disk.mirror, keep=ct.All()))
    gc.collect()
    before = sum(isinstance(each, Manifest) for each in gc.get_objects())
    with ct.open(spec) as ckpt:
        for step in range(1, 9):
            ckpt.save(step, state_at(step))
            ckpt.wait()
            wait_for(lambda step=step: step in ckpt.mirror_status.copied)
        gc.collect()
        held = sum(isinstance(each, Manifest) for each in gc.get_objects()) - before
    assert ckpt.mirror_status.copied == tuple(range(1, 9))
    assert held <= 3, "those of the steps here, and not of the copies"


def test_a_hanging_store_is_waited_for_at_most_wait_s(on_disk, monkeypatch):
    hang = threading.Event()
    monkeypatch.setattr(remote_store.RemoteStore, "list_names", lambda store: hang.wait(20) and ())
    began = time.monotonic()
    status, warned = save(changed(on_disk, wait_s=0.2), 1)
    hang.set()
    assert time.monotonic() - began < 10
    assert status.pending == (1,)
    assert any("longer than wait_s=0.2" in text for text in warned)


def test_a_spec_without_a_mirror_has_no_status(on_disk):
    status, _ = save(dataclasses.replace(on_disk, mirror=None), 1)
    assert status is None
