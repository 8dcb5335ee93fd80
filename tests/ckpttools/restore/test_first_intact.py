# SPDX-License-Identifier: Apache-2.0
"""Damaged steps are skipped, named and kept; a run with steps never starts afresh."""

import shutil

import jax.numpy as jnp
import pytest

import ckpttools as ct
from tests.ckpttools.behaviour.examples import leaves

STATE = {
    "model": {"small": jnp.arange(4.0), "large": jnp.arange(4096.0) * 0.37},
    "optimizer": {"mu": jnp.arange(2048.0) * 0.11},
}


def spec_for(directory):
    return ct.CheckpointSpec(directory=directory, keep=ct.All())


@pytest.fixture
def run(tmp_path):
    with ct.open(spec_for(tmp_path)) as ckpt:
        for step in (10, 20, 30):
            ckpt.save(step, {item: {k: v + step for k, v in tree.items()} for item, tree in STATE.items()})
    return tmp_path


def largest_file(directory):
    return max((path for path in directory.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def flip_bit(path, position=0.5):
    data = bytearray(path.read_bytes())
    data[int(len(data) * position)] ^= 1
    path.write_bytes(data)


def restore(directory, **options):
    with ct.open(spec_for(directory)) as ckpt:
        return ckpt.restore(STATE, **options)


def test_a_flipped_bit_is_found_named_and_passed_over(run):
    flip_bit(largest_file(run / "30" / "model"))
    report = restore(run)
    assert report.step == 20
    assert (
        leaves(report.state)["model.large"] == leaves({"model": {"large": STATE["model"]["large"] + 20}})["model.large"]
    )
    (rejected,) = report.rejected
    assert rejected.verdict == "corrupt"
    assert rejected.leaves == ("model.large",)
    assert rejected.files[0].startswith("model/ocdbt.process_0/d/")
    assert rejected.moved_to == run / ".ckpttools" / "quarantine" / "30"
    assert rejected.moved_to.is_dir()
    text = str(report)
    assert "damaged leaf: model.large" in text
    assert "step 20: used" in text
    assert report.as_dict()["candidates"][0]["step"] == 30


def test_a_truncated_file_makes_a_step_incomplete(run):
    path = largest_file(run / "30")
    path.write_bytes(path.read_bytes()[:-1])
    report = restore(run)
    assert (report.step, report.rejected[0].verdict) == (20, "incomplete")


def test_a_missing_manifest_makes_a_step_incomplete(run):
    (run / "30" / "ckpttools.manifest").unlink()
    report = restore(run)
    assert (report.step, report.rejected[0].verdict) == (20, "incomplete")


def test_a_damaged_manifest_never_stops_a_run_from_opening(run):
    flip_bit(run / "30" / "ckpttools.manifest")
    report = restore(run)
    assert (report.step, report.rejected[0].verdict) == (20, "corrupt")


def test_a_step_under_another_number_is_refused(run):
    shutil.rmtree(run / "30")
    shutil.copytree(run / "10", run / "30")
    report = restore(run)
    assert report.step == 20
    assert "belongs to step 10" in report.rejected[0].reason


def test_all_damaged_raises_with_the_report_and_loses_nothing(run):
    for step in ("10", "20", "30"):
        flip_bit(largest_file(run / step))
    with pytest.raises(ct.NoIntactStepError, match="none of the 3") as caught:
        restore(run)
    assert [candidate.step for candidate in caught.value.report.candidates] == [30, 20, 10]
    assert all((run / step).is_dir() for step in ("10", "20", "30"))
    with pytest.raises(ct.NoIntactStepError):
        restore(run)


def test_a_damaged_step_that_was_asked_for_by_number_raises(run):
    path = largest_file(run / "30")
    path.write_bytes(b"")
    with pytest.raises(ct.IncompleteStepError, match="has 0 of"):
        restore(run, step=30)


def test_an_empty_numbered_directory_is_not_a_step(tmp_path):
    (tmp_path / "7").mkdir()
    with ct.open(spec_for(tmp_path)) as ckpt:
        assert ckpt.latest_step() is None
        report = ckpt.restore(STATE)
        assert report.step is None
        assert report.rejected[0].verdict == "empty"
        ckpt.save(7, STATE)
        ckpt.wait()
        assert ckpt.all_steps() == (7,)


def test_items_that_are_left_out_are_not_read(run):
    flip_bit(largest_file(run / "30" / "model"))
    with ct.open(spec_for(run)) as ckpt:
        assert ckpt.restore({"optimizer": STATE["optimizer"]}).step == 30


def test_an_unreadable_intact_step_raises_and_none_older_is_used(run, monkeypatch):
    def fail(*_args, **_kwargs):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("orbax.checkpoint.v1.load_checkpointables", fail)
    with pytest.raises(ct.StorageError, match="although its files are intact"):
        restore(run)
    assert (run / "30").is_dir()
