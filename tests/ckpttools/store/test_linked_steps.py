# SPDX-License-Identifier: Apache-2.0
"""A step that was moved to another disk and linked: read and verified, and nothing outside the run is changed."""

import os

import numpy as np
import pytest

import ckpttools as ct
from ckpttools.store import layout


def make_state(value=0.0):
    return {"item": {"w": np.full(4, float(value))}}


def spec_for(directory, **fields):
    return ct.CheckpointSpec(
        directory=directory, **{"storage": ct.Storage(asynchronous=False), "keep": ct.All(), **fields}
    )


@pytest.fixture(params=["absolute", "relative"])
def linked(request, tmp_path):
    """A run of three steps; returns it and the place where its second step lies."""
    run, disk = tmp_path / "run", tmp_path / "disk"
    with ct.open(spec_for(run)) as ckpt:
        for step in (1, 2, 3):
            ckpt.save(step, make_state(step), {"loss": 1.0 / step})
    disk.mkdir()
    os.rename(run / "2", disk / "two")
    (run / "2").symlink_to(disk / "two" if request.param == "absolute" else "../disk/two")
    return run, disk / "two"


def test_a_linked_step_is_listed_verified_and_restored(linked):
    run, place = linked
    assert [(step.step, step.state) for step in ct.ls(run)] == [(1, "committed"), (2, "committed"), (3, "committed")]
    assert ct.verify(run).ok
    assert ct.load(run, make_state(), step=2).state["item"]["w"][0] == 2
    assert ct.record(run, 2, {"val": 0.5})["val"] == 0.5
    assert ct.load(run, make_state(), step=ct.best("val", mode="min")).step == 2
    (place / "item" / "manifest.ocdbt").write_bytes(b"gold")
    assert not ct.verify(run).ok  # control: what is behind the link was read
    with pytest.raises(ct.StepDamagedError):
        ct.load(run, make_state(), step=2)


def test_retention_keeps_a_linked_step_and_delete_leaves_its_files(linked):
    run, place = linked
    with ct.open(spec_for(run, keep=ct.Latest(1))) as ckpt:
        ckpt.restore(make_state())
        for step in (4, 5):
            ckpt.save(step, make_state(step))
        assert ckpt.all_steps() == (2, 4, 5)
        ckpt.delete(2)
        assert ckpt.all_steps() == (4, 5)
    assert (place / layout.MANIFEST).is_file()
    assert not list(layout.get_control_path(run, "trash").iterdir())


def test_a_linked_step_moves_aside_as_a_working_link(linked):
    run, place = linked
    with ct.open(spec_for(run)) as ckpt:
        ckpt.restore(make_state(), step=1)
        ckpt.save(2, make_state(-2))
    assert [(step.step, step.state) for step in ct.ls(run)] == [
        (1, "committed"),
        (2, "superseded"),
        (3, "superseded"),
        (2, "committed"),
    ]
    (moved,) = layout.get_control_path(run, "superseded").iterdir()
    assert moved.resolve() == place.resolve()


def test_a_dangling_link_is_not_damage_or_a_fresh_start(linked):
    run, place = linked
    os.rename(place, place.parent / "away")
    assert {step.step: step.state for step in ct.ls(run)}[2] == "unreadable"
    for step in (1, 3):
        os.rename(run / str(step), place.parent / str(step))
    with (
        ct.open(spec_for(run)) as ckpt,
        pytest.raises(ct.StorageError, match=r"step 2 is a link to .*which does not exist"),
    ):
        ckpt.restore(make_state())
    assert (run / "2").is_symlink()
    os.rename(place.parent / "away", place)  # control: mounted again
    with ct.open(spec_for(run)) as ckpt:
        assert ckpt.restore(make_state()).step == 2


def test_links_to_anything_but_a_step_are_passed_over(linked):
    run, place = linked
    (place / layout.MANIFEST).unlink()
    (run / "7").symlink_to(run / "1")
    with ct.open(spec_for(run)) as ckpt:
        report = ckpt.restore(make_state())
    assert report.step == 3
    assert place.is_dir()
    assert (run / "1").is_dir()
