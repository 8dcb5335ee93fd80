# SPDX-License-Identifier: Apache-2.0
"""No answer of a store is trusted, and each of its failures is reported."""

import shutil
import sys

import pytest

import ckpttools as ct
from ckpttools.mirror import remote_store
from ckpttools.store import digest, layout
from tests.ckpttools import stores
from tests.ckpttools.mirror.mirrors import changed, nas, restore, restore_locally, save
from tests.ckpttools.restore.test_first_intact import flip_bit, largest_file


@pytest.fixture(scope="module")
def reader(s3):
    """A user who may look and not write."""
    return s3.add_user("reader", "s3:ListBucket", "s3:GetObject")


def test_missing_credentials_are_reported_and_training_continues(on_s3, monkeypatch, s3):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    status, warned = save(on_s3, 1)
    assert "credentials" in status.error.lower()
    assert any("the mirror is not up to date" in text for text in warned)
    assert ct.verify(on_s3.directory).ok


@pytest.mark.parametrize(
    ("who", "says"),
    [
        pytest.param(lambda key, secret: ("nobody", secret), "does not exist", id="unknown-key"),
        pytest.param(lambda key, secret: (key, "guessed"), "signature", id="wrong-secret"),
        pytest.param(lambda key, secret: (key, secret), "Access Denied", id="may-only-read"),
    ],
)
def test_rejected_credentials_are_reported_once_and_copied_next_session(on_s3, monkeypatch, s3, reader, who, says):
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


def test_a_store_that_changes_bytes_is_detected(on_disk, monkeypatch):
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


def test_a_store_that_changes_the_manifest_is_detected(on_disk, monkeypatch):
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


def test_a_store_may_not_send_more_than_the_manifest_says(on_disk):
    save(on_disk, 1)
    with largest_file(nas(on_disk, 1)).open("ab") as file:
        file.write(b"x" * (1 << 24))
    shutil.rmtree(on_disk.directory)
    with pytest.raises(ct.NoIntactStepError):
        restore(on_disk)


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


def test_opening_a_run_imports_no_driver(tmp_path, monkeypatch):
    for name in ("fsspec", "s3fs"):
        monkeypatch.setitem(sys.modules, name, None)
    with ct.open(ct.CheckpointSpec(directory=tmp_path / "run", mirror="s3://bucket/run")) as ckpt:
        assert ckpt.mirror_status == ct.MirrorStatus(url="s3://bucket/run")
