# SPDX-License-Identifier: Apache-2.0
"""Links in a run's control folder: nothing outside the run is deleted or overwritten."""

import numpy as np
import pytest

import ckpttools as ct
from ckpttools.store import commit, layout
from ckpttools.store.lock import WriterLock

STATE = {"x": np.arange(3.0)}


def save(folder, step):
    spec = ct.CheckpointSpec(directory=folder, save=ct.EverySteps(1), storage=ct.Storage(asynchronous=False))
    with ct.open(spec) as ckpt:
        ckpt.restore(dict(STATE))
        ckpt.save(step, STATE)


@pytest.mark.parametrize("name", ["staging", "trash", "spare", "lock", "pins.json.new", ""])
def test_a_link_in_the_control_directory_is_refused(tmp_path, name):
    run, outside = tmp_path / "run", tmp_path / "outside"
    save(run, 1)
    (outside / "staging" / "gold").mkdir(parents=True)
    (outside / "file").write_text("gold")
    place = layout.get_control_path(run, name)
    if place.exists():
        place.rename(tmp_path / "before")
    place.symlink_to(outside / "file" if name in ("lock", "pins.json.new") else outside)
    before = sorted(outside.rglob("*"))
    with pytest.raises(ct.StorageError, match="is a link"):
        save(run, 2)
    if name == "pins.json.new":
        with ct.open(ct.CheckpointSpec(directory=run)) as ckpt, pytest.raises(ct.StorageError, match="is a link"):
            ckpt.pin(1)
    with pytest.raises(ct.StorageError, match="is a link"):
        WriterLock(run).acquire()
    assert sorted(outside.rglob("*")) == before
    assert (outside / "file").read_text() == "gold"


def test_a_run_without_links_is_confined(tmp_path):
    """The control: an ordinary run, also behind a link of the user's own, is written as ever."""
    commit.require_confined(tmp_path)
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "disk")
    save(tmp_path / "run", 1)
    assert (tmp_path / "disk" / "1").is_dir()


def test_second_copies_are_not_written_through_a_link(tmp_path):
    run, outside = tmp_path / "run", tmp_path / "outside"
    save(run, 1)
    outside.mkdir()
    layout.get_spare_directory(run, 2).symlink_to(outside)
    layout.get_spare_directory(run, 3).mkdir()
    (outside / "file").write_text("gold")
    (layout.get_spare_directory(run, 3) / layout.MANIFEST).symlink_to(outside / "file")
    for step in (2, 3):
        save(run, step)
    assert [path.name for path in outside.iterdir()] == ["file"]
    assert (outside / "file").read_text() == "gold"
    assert (layout.get_spare_directory(run, 3) / layout.MANIFEST).is_file()


@pytest.mark.parametrize("name", ["x" * 201, "_CHECKPOINT_METADATA", "metrics"])
def test_an_item_name_that_cannot_be_a_directory_is_refused(tmp_path, name):
    with ct.open(ct.CheckpointSpec(directory=tmp_path)) as ckpt, pytest.raises(ct.LeafError, match="is named"):
        ckpt.save(1, {name: np.ones(1)})
