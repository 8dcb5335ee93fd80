# SPDX-License-Identifier: Apache-2.0
"""Every step at a mirror, whatever the store does; and back from it, whatever the local disk did.

Against a real S3 server on loopback whose connections can be cut, and against a local folder.
"""

import dataclasses
import gc
import pathlib
import shutil
import sys
import threading
import time
import warnings

import jax.numpy as jnp
import numpy as np
import pytest

import ckpttools as ct
from ckpttools.mirror import remote_store, upload_plan
from ckpttools.store import layout
from ckpttools.store.manifest import Manifest, Summary
from tests.ckpttools import stores
from tests.ckpttools.restore.test_first_intact import flip_bit, largest_file

STATE = {"model": {"w": jnp.arange(4096.0), "b": jnp.arange(3.0)}}


def state_at(step):
    return {"model": {name: value + step for name, value in STATE["model"].items()}}


def save(spec, *steps, **options):
    """A session that saves steps and closes; what it warned of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with ct.open(spec) as ckpt:
            ckpt.restore(STATE) if spec.directory.exists() and any(spec.directory.glob("[0-9]*")) else None
            for step in steps:
                ckpt.save(step, state_at(step), **options)
                ckpt.wait()
        return ckpt.mirror_status, [str(each.message) for each in caught]


def restore(spec, **options):
    with ct.open(spec) as ckpt:
        report = ckpt.restore(STATE, **options)
    if report.step is not None:
        np.testing.assert_array_equal(report.state["model"]["w"], state_at(report.step)["model"]["w"])
    return report


def damage(spec, step):
    flip_bit(largest_file(spec.directory / str(step) / "model"))


@pytest.fixture(scope="module")
def s3():
    server = stores.S3()
    yield server
    server.stop()


@pytest.fixture
def way(s3, monkeypatch):
    """A way to the server that can be cut, with credentials in the environment as the driver finds them."""
    for name, value in {**stores.USER, "AWS_MAX_ATTEMPTS": "1", "AWS_EC2_METADATA_DISABLED": "true"}.items():
        monkeypatch.setenv(name, value)
    way = stores.Way(s3.port)
    yield way
    way.close()


@pytest.fixture
def on_s3(way, tmp_path, request):
    options = {"endpoint_url": f"http://127.0.0.1:{way.port}"}
    mirror = ct.Mirror(f"s3://bucket/{request.node.name}", options=options, wait_s=20)
    return ct.CheckpointSpec(directory=tmp_path / "run", mirror=mirror)


@pytest.fixture
def on_disk(tmp_path):
    mirror = ct.Mirror(f"file://{tmp_path / 'nas' / 'run'}", wait_s=20)
    return ct.CheckpointSpec(directory=tmp_path / "run", mirror=mirror)


def nas(spec, step):
    """The folder of a copy at a mirror on the disk."""
    (found,) = (pathlib.Path(spec.mirror.url.removeprefix("file://"))).glob(f"{step}-*")
    return found


def changed(spec, **fields):
    return dataclasses.replace(spec, mirror=dataclasses.replace(spec.mirror, **fields))


def test_on_s3_every_step_is_copied_and_an_empty_folder_is_filled_from_there(on_s3, s3, request):
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
    assert ct.verify(on_s3.directory).ok, "what was fetched is a step like any other"
    again = restore(on_s3)
    assert [each.source for each in again.candidates] == ["local"], "the nearest copy"
    assert save(on_s3, 3)[0].copied == (1, 2, 3), "the run goes on where it was"
    assert [row.branch for row in ct.ls(on_s3.directory)] == [ct.ls(on_s3.directory)[0].branch] * 2


def test_on_s3_a_truncated_object_is_found_and_the_next_copy_taken(on_s3, s3, request):
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
    assert not list(layout.get_control_path(on_s3.directory, "staging").iterdir()), (
        "what was fetched in vain is removed"
    )


def test_on_s3_a_connection_that_is_cut_half_way_never_stops_the_training(on_s3, way, s3, request):
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


def restore_offline(spec):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        report = restore(spec)
    assert report.mirror_error
    assert "only local steps were considered" in str(caught[-1].message)
    return report.step


def test_on_s3_wrong_credentials_are_reported_and_do_not_stop_the_training(on_s3, monkeypatch, s3):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    status, warned = save(on_s3, 1)
    assert "credentials" in status.error.lower()
    assert any("the mirror is not up to date" in text for text in warned)
    assert ct.verify(on_s3.directory).ok


@pytest.fixture(scope="module")
def reader(s3):
    """A user who may look and not write."""
    return s3.add_user("reader", "s3:ListBucket", "s3:GetObject")


@pytest.mark.parametrize(
    ("who", "says"),
    [
        pytest.param(lambda key, secret: ("nobody", secret), "does not exist", id="unknown-key"),
        pytest.param(lambda key, secret: (key, "guessed"), "signature", id="wrong-secret"),
        pytest.param(lambda key, secret: (key, secret), "Access Denied", id="may-only-read"),
    ],
)
def test_on_s3_rejected_credentials_are_reported_once_and_the_next_session_copies(
    on_s3, monkeypatch, s3, reader, who, says
):
    key, secret = who(*reader)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret)
    spec = changed(on_s3, url=on_s3.mirror.url.translate(str.maketrans("[]", "--")))
    with s3.guarded():
        status, warned = save(spec, 1, 2)
        assert (status.pending, status.copied) == ((1, 2), ())
        assert says in status.error
        assert sum("the mirror is not up to date" in text for text in warned) == 1
        assert any(says in text and "not copied to the mirror: 1, 2; the next" in text for text in warned)
        assert restore_locally(spec) == 2
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", stores.USER["AWS_ACCESS_KEY_ID"])
    status, warned = save(spec, 3)
    assert status.ok
    assert status.copied == (1, 2, 3)
    assert not warned


def restore_locally(spec):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return restore(spec).step


def test_a_store_that_takes_copies_and_deletes_none_is_reported_once(on_disk, monkeypatch):
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


def test_on_s3_a_connection_that_is_cut_while_a_step_is_fetched(on_s3, way):
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


def test_an_empty_folder_and_a_store_that_does_not_answer_is_no_fresh_start(on_s3, way):
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


def test_without_a_mirror_an_empty_folder_restores_nothing(on_disk):
    """The control: what the mirror does is done by nothing else."""
    save(on_disk, 1)
    shutil.rmtree(on_disk.directory)
    assert restore(dataclasses.replace(on_disk, mirror=None)).step is None
    assert restore(on_disk).step == 1


def test_a_step_that_is_damaged_here_is_fetched(on_disk):
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


def test_a_step_that_was_asked_for_and_is_intact_nowhere_is_an_error(on_disk):
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


def wait_for(condition, limit_s=20.0):
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_the_mirror_keeps_by_its_own_retention(on_disk):
    spec = dataclasses.replace(on_disk, keep=ct.All(), mirror=dataclasses.replace(on_disk.mirror, keep=ct.Latest(2)))
    assert save(spec, 1, 2, 3, 4)[0].copied == (3, 4)
    assert [row.step for row in ct.ls(spec.directory)] == [1, 2, 3, 4]


def test_a_copy_without_a_manifest_is_no_step_and_is_taken_up_again(on_disk):
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


def test_a_leftover_of_a_step_that_is_gone_is_removed(on_disk):
    save(on_disk, 1)
    left = nas(on_disk, 1).with_name("7-0123abcd")
    left.mkdir()
    (left / "piece").write_text("x")
    stranger = left.with_name("notes")
    stranger.mkdir()
    (stranger / "mine").write_text("x")
    save(on_disk, 2)
    assert not left.exists()
    assert (stranger / "mine").exists(), "what has no name of ours is not touched"


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


def test_the_steps_of_another_run_at_the_same_address_are_left_alone(on_disk, tmp_path):
    save(on_disk, 1, 2)
    other = dataclasses.replace(changed(on_disk, keep=ct.Latest(1)), directory=tmp_path / "other")
    status, warned = save(other, 5, 6, 7)
    assert set(status.copied) == {1, 2, 6, 7}
    assert any("2 step(s) of another run" in text for text in warned)
    assert restore(other).step == 7
    assert restore(on_disk).step == 2


def test_going_back_on_purpose_holds_at_the_mirror_too(on_disk):
    save(on_disk, 1, 2, 3)
    with ct.open(on_disk) as ckpt:
        ckpt.restore(STATE, step=1)
        ckpt.save(2, state_at(2))
    assert restore(on_disk).step == 2
    shutil.rmtree(on_disk.directory)
    assert restore(on_disk).step == 2, "the copies of the branch that was left do not come back"


def test_a_run_that_went_on_elsewhere_is_taken_up(on_disk, tmp_path):
    save(on_disk, 1, 2)
    elsewhere = dataclasses.replace(on_disk, directory=tmp_path / "elsewhere")
    assert restore(elsewhere).step == 2
    save(elsewhere, 3)
    assert restore(on_disk).step == 3


def test_a_past_that_the_run_has_left_does_not_come_back(on_disk, tmp_path):
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


def test_a_step_is_copied_whole_though_retention_deletes_it_meanwhile(on_disk, monkeypatch):
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


def summaries_alive():
    gc.collect()
    return sum(isinstance(each, Summary) for each in gc.get_objects())


def test_a_mirror_that_is_slower_than_the_saves_takes_no_more_memory_and_loses_nothing_at_the_end(on_disk, monkeypatch):
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
                alive.append(summaries_alive())
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


def test_a_mirror_of_many_steps_is_known_by_summaries_only(on_disk):
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


def test_a_store_that_hangs_is_waited_for_no_longer_than_agreed(on_disk, monkeypatch):
    hang = threading.Event()
    monkeypatch.setattr(remote_store.RemoteStore, "list_names", lambda store: hang.wait(20) and ())
    began = time.monotonic()
    status, warned = save(changed(on_disk, wait_s=0.2), 1)
    hang.set()
    assert time.monotonic() - began < 10
    assert status.pending == (1,)
    assert any("longer than wait_s=0.2" in text for text in warned)


def test_a_store_that_changes_bytes_is_found_out(on_disk, monkeypatch):
    send = remote_store.RemoteStore._upload_file

    def flipping(store, source, name, file):
        send(store, source, name, file)
        copy = nas(on_disk, int(name[0])) / file
        if not file.startswith("_") and copy.stat().st_size:
            flip_bit(copy)

    monkeypatch.setattr(remote_store.RemoteStore, "_upload_file", flipping)
    status, _ = save(on_disk, 1)
    assert "came back" in status.error
    assert status.copied == ()
    status, _ = save(changed(on_disk, verify="size", url=on_disk.mirror.url), 2)
    assert 2 in status.copied, "the control: sizes alone do not tell"


def test_a_store_that_changes_the_manifest_is_found_out(on_disk, monkeypatch):
    monkeypatch.setattr(remote_store.RemoteStore, "_read_small", lambda store, path: b"no manifest")
    status, _ = save(on_disk, 1)
    assert "the manifest of 1-" in status.error


def test_names_from_a_store_never_leave_the_run(on_disk, tmp_path, monkeypatch):
    save(on_disk, 1)
    shutil.rmtree(on_disk.directory)
    copy = nas(on_disk, 1)
    secret = tmp_path / "outside"
    lines = (copy / layout.MANIFEST).read_bytes().split(b"\n")
    hostile = lines[1].replace(b'"_CHECKPOINT_METADATA"', b'"../../../outside"')
    body = hostile + b"\n" + lines[2]
    from ckpttools.store import digest

    seal = b'{"ckpttools":1,"digest":"%s"}' % digest.hash_bytes("xxh3", body).encode()
    data = seal + b"\n" + body
    with pytest.raises(ct.UntrustedStepError):
        remote_store.get_copy_name(data)
    (copy / layout.MANIFEST).write_bytes(data)
    assert restore(on_disk).step is None, "a manifest that leads outside is no copy"
    assert not secret.exists()
    store = remote_store.RemoteStore(on_disk.mirror.url, {})
    for name in ("..", "1-0123abcd/../x", "notes"):
        with pytest.raises(ValueError):
            store.delete(name)


def test_nothing_is_fetched_through_a_link_out_of_the_run(on_disk, tmp_path):
    save(on_disk, 1)
    shutil.rmtree(on_disk.directory / "1")
    shutil.rmtree(layout.get_control_path(on_disk.directory, "staging"))
    (tmp_path / "outside").mkdir()
    layout.get_control_path(on_disk.directory, "staging").symlink_to(tmp_path / "outside")
    with pytest.raises(ct.StorageError, match="is a link"):
        restore(on_disk)
    assert not list((tmp_path / "outside").iterdir())


def test_a_store_may_not_send_more_than_the_manifest_says(on_disk):
    save(on_disk, 1)
    with largest_file(nas(on_disk, 1)).open("ab") as file:
        file.write(b"x" * (1 << 24))
    shutil.rmtree(on_disk.directory)
    with pytest.raises(ct.NoIntactStepError):
        restore(on_disk)


def test_too_little_room_for_a_fetch(on_disk, monkeypatch):
    save(on_disk, 1)
    shutil.rmtree(on_disk.directory)
    usage = type(shutil.disk_usage("/"))(total=100, used=99, free=1)
    with monkeypatch.context() as patched, ct.open(on_disk) as ckpt:
        patched.setattr(shutil, "disk_usage", lambda path: usage)
        with pytest.raises(ct.DiskSpaceError, match="at the mirror takes"):
            ckpt.restore(STATE)


def test_a_disk_that_refuses_what_is_fetched(on_disk, monkeypatch):
    save(on_disk, 1)
    shutil.rmtree(on_disk.directory)

    def refuse(*args, **options):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(remote_store.RemoteStore, "_fetch_file", refuse)
    with pytest.raises(ct.StorageError, match="could not be fetched from the mirror"):
        restore(on_disk)


def test_a_reader_beside_the_run_fetches_and_leaves_nothing(on_disk):
    save(on_disk, 1, 2)
    shutil.rmtree(on_disk.directory / "2")
    with ct.open(on_disk) as writer:
        writer.restore(STATE, step=1)
        writer.steps(9)
        with ct.open(dataclasses.replace(on_disk)) as reader:
            assert reader.restore(STATE).step == 2
        assert not (on_disk.directory / "2").exists()
        assert not list(layout.get_control_path(on_disk.directory, "staging").iterdir())


def test_without_fsspec_the_error_says_what_to_install(on_disk, monkeypatch):
    monkeypatch.setitem(sys.modules, "fsspec", None)
    status, _ = save(on_disk, 1)
    assert "needs the package fsspec" in status.error
    with pytest.raises(ct.MirrorError, match=r"nnx-checkpointing\[mirror\]"):
        remote_store.RemoteStore("s3://bucket/run", {}).list_names()


def test_an_unknown_kind_of_address_is_reported(tmp_path):
    spec = ct.CheckpointSpec(directory=tmp_path / "run", mirror="nonsense://x/y")
    status, _ = save(spec, 1)
    assert "nonsense" in status.error


def test_a_spec_without_a_mirror_has_no_status(on_disk):
    status, _ = save(dataclasses.replace(on_disk, mirror=None), 1)
    assert status is None


def test_opening_a_run_imports_no_driver(tmp_path, monkeypatch):
    for name in ("fsspec", "s3fs"):
        monkeypatch.setitem(sys.modules, name, None)
    with ct.open(ct.CheckpointSpec(directory=tmp_path / "run", mirror="s3://bucket/run")) as ckpt:
        assert ckpt.mirror_status == ct.MirrorStatus(url="s3://bucket/run")


def summary(step, saved_at, lineage=(("a", 0),)):
    return Summary(
        step=step,
        sequence=step,
        saved_at=saved_at,
        run_s=0.0,
        metrics={},
        lineage=lineage,
        reason="",
        spec="",
        files={},
    )


def test_the_plan_copies_the_newest_first_and_deletes_what_nothing_keeps():
    local = {f"{step}-x": summary(step, step) for step in (3, 4, 5)}
    there = {f"{step}-x": summary(step, step) for step in (1, 2, 3)}
    todo = upload_plan.make_upload_plan(
        local, there, [*there, "9-y"], ct.Latest(3), lineage=(("a", 0),), deleted={}, pins=frozenset({1})
    )
    assert todo.names_to_copy == ("5-x", "4-x")
    assert todo.names_to_delete == ("2-x", "9-y")
    assert not todo.missed_names
