# SPDX-License-Identifier: Apache-2.0
"""A manifest is data: what it says is checked, what it asks for is refused where no honest step asks for it."""

import contextlib
import json
import os
import sys

import jax.numpy as jnp
import pytest

import ckpttools as ct
from ckpttools.store import digest, layout, manifest, orbax
from ckpttools.tree.records import Record

STATE = {"model": {"w": jnp.arange(8.0)}, "data": {"epoch": 3}}


@pytest.fixture
def step(tmp_path):
    with ct.open(ct.CheckpointSpec(directory=tmp_path)) as ckpt:
        ckpt.save(5, STATE)
    return tmp_path / "5"


def reseal(step, change, *, line):
    """Change one line of a manifest and give it a checksum that fits, as an attacker would."""
    path = step / layout.MANIFEST
    lines = [json.loads(text) for text in path.read_bytes().split(b"\n")]
    lines[line] = change(lines[line]) or lines[line]
    body = b"\n".join(json.dumps(entry).encode() for entry in lines[1:])
    seal = {**lines[0], "digest": digest.hash_bytes("xxh3", body)}
    path.write_bytes(json.dumps(seal).encode() + b"\n" + body)


def restore(step):
    with ct.open(ct.CheckpointSpec(directory=step.parent)) as ckpt:
        return ckpt.restore(STATE, step=5)


def test_resealing_alone_changes_nothing(step):
    """The control of the tests below."""
    reseal(step, lambda entry: None, line=2)
    assert restore(step).step == 5


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/../../b", "a\\b", "", "a\0b"])
def test_paths_out_of_the_step_are_refused(step, name):
    reseal(step, lambda entry: entry["files"].update({name: [1, "xxh3:0"]}), line=1)
    with pytest.raises(ct.UntrustedStepError, match="names the file"):
        restore(step)


@pytest.mark.parametrize("target", ["file", "folder"])
def test_links_out_of_the_run_are_refused(step, tmp_path_factory, target):
    outside = tmp_path_factory.mktemp("outside")
    inside = {"file": step / "_CHECKPOINT_METADATA", "folder": step / "model"}[target]
    os.rename(inside, outside / "moved")
    inside.symlink_to(outside / "moved")
    with pytest.raises(ct.CorruptStepError, match="link"):
        restore(step)


def test_a_manifest_that_is_a_link_is_refused(step, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside") / "m"
    os.rename(step / layout.MANIFEST, outside)
    (step / layout.MANIFEST).symlink_to(outside)
    with pytest.raises(ct.UntrustedStepError, match="not a regular file"):
        restore(step)


def test_an_absurdly_large_manifest_is_not_read(step, monkeypatch):
    monkeypatch.setattr(manifest, "MAX_BYTES", 100)
    with pytest.raises(ct.UntrustedStepError, match="are not read"):
        restore(step)


def test_absurd_shapes_are_refused_before_memory_is_asked_for(step):
    def enlarge(entry):
        entry["items"]["model"]["leaves"][0]["shape"] = [2**40, 2**40]

    reseal(step, enlarge, line=2)
    with pytest.raises(ct.CorruptStepError, match="is not valid"):
        restore(step)

    def enlarge_legally(entry):
        entry["items"]["model"]["leaves"][0]["shape"] = [2**40]

    reseal(step, enlarge_legally, line=2)
    with pytest.raises(ct.StructureError, match="1099511627776"):
        restore(step)


def test_deep_nesting_is_refused(step):
    path = step / layout.MANIFEST
    lines = path.read_bytes().split(b"\n")
    body = b"\n".join([lines[1], b"[" * 100_000 + b"]" * 100_000])
    seal = {"ckpttools": 1, "digest": digest.hash_bytes("xxh3", body)}
    path.write_bytes(json.dumps(seal).encode() + b"\n" + body)
    with pytest.raises(ct.CorruptStepError):
        restore(step)


@pytest.mark.parametrize(
    "leaf",
    [
        pytest.param({"path": ["epoch"], "kind": "value", "value": {"pickle": "gASVAAAA"}}, id="a pickle"),
        pytest.param({"path": ["epoch"], "kind": "value", "value": {"float": "x"}}, id="no number"),
        pytest.param({"path": ["epoch"], "kind": "object"}, id="an unknown kind"),
        pytest.param({"path": [1.5], "kind": "value"}, id="a path of floats"),
        pytest.param({"path": ["epoch"], "kind": "value", "module": "os"}, id="an unknown field"),
        pytest.param({"kind": "value"}, id="no path"),
    ],
)
def test_leaves_of_unknown_form_are_refused(step, leaf):
    reseal(step, lambda entry: entry["items"]["data"].update(leaves=[leaf]), line=2)
    with pytest.raises(ct.CorruptStepError):
        restore(step)


def test_unknown_dtypes_and_keys_are_refused():
    from ckpttools.tree.records import get_host_shape

    for record in (Record(path=("x",), kind="array", dtype="os.system"), Record(path=("x",), kind="key", dtype="evil")):
        with pytest.raises(ct.CorruptStepError, match="unknown"):
            get_host_shape(record)


def test_nothing_is_imported_because_a_checkpoint_names_it(step, tmp_path, monkeypatch):
    evil = tmp_path / "evil_handler.py"
    evil.write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    path = step / "_CHECKPOINT_METADATA"
    data = json.loads(path.read_bytes())
    data["item_handlers"] = dict.fromkeys(data["item_handlers"], "evil_handler.Handler")
    path.write_bytes(json.dumps(data).encode())
    mark = [path.stat().st_size, digest.hash_file("xxh3", path)]
    reseal(step, lambda entry: entry["files"].update({"_CHECKPOINT_METADATA": mark}), line=1)
    with contextlib.suppress(ct.CheckpointError):
        restore(step)
    assert "evil_handler" not in sys.modules


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda entry: entry.update(lineage=[]), id="no lineage"),
        pytest.param(lambda entry: entry.update(metrics=3), id="no metrics"),
        pytest.param(lambda entry: entry.update(step="5"), id="a step that is no int"),
        pytest.param(lambda entry: entry.pop("sequence") and None, id="a missing field"),
        pytest.param(lambda entry: [1], id="no object"),
    ],
)
def test_summaries_of_unknown_form_are_corrupt_without_ending_the_run(step, change):
    reseal(step, change, line=1)
    with ct.open(ct.CheckpointSpec(directory=step.parent)) as ckpt:
        assert ckpt.latest_step() is None
        with pytest.raises(ct.NoIntactStepError):
            ckpt.restore(STATE)


def set_seal(step, **fields):
    path = step / layout.MANIFEST
    first, rest = path.read_bytes().split(b"\n", 1)
    path.write_bytes(json.dumps({**json.loads(first), **fields}).encode() + b"\n" + rest)


def test_a_newer_format_is_an_error_and_no_damage(step):
    set_seal(step, ckpttools=99, format=99)
    before = sorted(step.rglob("*"))
    with pytest.raises(ct.VersionError, match=r"format 99[^*]*newer version of ckpttools") as caught:
        restore(step)
    assert "install the version that wrote it" in caught.value.fix
    assert sorted(step.rglob("*")) == before
    (listed,) = ct.ls(step.parent)
    assert listed.state == "newer"
    assert not ct.verify(step.parent).ok


def test_a_newer_format_beside_older_steps_is_not_skipped(step):
    with ct.open(ct.CheckpointSpec(directory=step.parent)) as ckpt:
        ckpt.restore(STATE)
        ckpt.save(6, STATE)
    set_seal(step.parent / "6", ckpttools=2, format=2)
    with ct.open(ct.CheckpointSpec(directory=step.parent)) as ckpt:
        with pytest.raises(ct.VersionError):
            ckpt.restore(STATE)
        assert ckpt.restore(STATE, step=5).step == 5


def test_a_flipped_bit_in_the_format_is_damage(step):
    set_seal(step, ckpttools=3)
    with pytest.raises(ct.CorruptStepError, match="damaged"):
        restore(step)


def test_sha256_finds_a_changed_manifest_and_is_named_in_it(tmp_path):
    spec = ct.CheckpointSpec(directory=tmp_path, integrity=ct.Integrity(digest="sha256"))
    with ct.open(spec) as ckpt:
        ckpt.save(5, STATE)
    text = (tmp_path / "5" / layout.MANIFEST).read_text()
    assert "sha256:" in text
    assert "xxh3:" not in text
    assert restore(tmp_path / "5").step == 5


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"metrics": {"v": 10**400}}, id="a metric beyond floats"),
        pytest.param({"lineage": [["a", float("inf")]]}, id="an infinite branch point"),
        pytest.param({"files": {"x": [float("inf"), "xxh3:0"]}}, id="an infinite size"),
        pytest.param({"run_s": "long"}, id="a clock of words"),
    ],
)
def test_absurd_numbers_in_one_summary_do_not_stop_the_run(step, change):
    with ct.open(ct.CheckpointSpec(directory=step.parent)) as ckpt:
        ckpt.restore(STATE)
        ckpt.save(6, STATE)
    reseal(step, lambda entry: {**entry, **change}, line=1)
    assert {listed.step: listed.state for listed in ct.ls(step.parent)} == {5: "corrupt", 6: "committed"}
    with ct.open(ct.CheckpointSpec(directory=step.parent)) as ckpt:
        assert ckpt.restore(STATE).step == 6


def test_too_little_host_memory_is_not_damage(step, monkeypatch):
    def read(folder, records):
        raise MemoryError("Unable to allocate 8.00 TiB")

    monkeypatch.setattr(orbax, "read", read)
    with pytest.raises(ct.StorageError, match="needs more host memory"):
        restore(step)


@pytest.mark.parametrize("moment", [float("nan"), float("inf"), 1e300, -1e18], ids=str)
def test_a_moment_that_no_calendar_has_ends_no_listing(step, moment):
    reseal(step, lambda entry: entry.update(saved_at=moment), line=1)
    assert "corrupt" in str(ct.ls(step.parent))


def test_verify_judges_the_other_steps_when_one_cannot_be_read(step):
    with ct.open(ct.CheckpointSpec(directory=step.parent)) as ckpt:
        ckpt.restore(STATE)
        ckpt.save(6, STATE)

    def another_shape(entry):
        for leaf in entry["items"]["model"]["leaves"]:
            leaf["shape"] = [2**40]

    reseal(step, another_shape, line=2)
    report = ct.verify(step.parent)
    assert [each.state for each in report.steps] == ["unreadable", "intact"]
    assert not report.ok
