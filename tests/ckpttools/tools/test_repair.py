# SPDX-License-Identifier: Apache-2.0
"""`repair` restores small files bit for bit, and writes nothing through a link."""

import os

import pytest

import ckpttools as ct
from ckpttools.store import catalogue, layout
from tests.ckpttools.restore.test_first_intact import STATE, flip_bit, largest_file, restore, spec_for
from tests.ckpttools.tools.runs import small_files, snapshot_of


def test_repair_puts_back_every_small_file_bit_by_bit(run):
    before = snapshot_of(run / "30")
    for path in small_files(run / "30"):
        flip_bit(path)
    dry = ct.repair(run, dry_run=True)
    assert dry.dry_run
    assert "dry run" in str(dry)
    assert snapshot_of(run / "30") != before, "a dry run touches nothing"
    report = ct.repair(run)
    assert len(report.repairs) == len(small_files(run / "30"))
    assert snapshot_of(run / "30") == before
    assert str(ct.repair(run)) == "nothing to repair"
    assert restore(run).step == 30


def test_repair_restores_deleted_files_and_quarantined_steps(run):
    before = snapshot_of(run / "30")
    (run / "30" / "model" / "_METADATA").unlink()
    assert restore(run).step == 20
    assert not (run / "30").exists()
    report = ct.repair(run)
    assert "moved back to 30" in str(report)
    assert snapshot_of(run / "30") == before
    assert restore(run).step == 30


def test_repair_leaves_a_quarantined_step_whose_number_is_taken(run):
    flip_bit(run / "30" / "_CHECKPOINT_METADATA")
    with ct.open(spec_for(run)) as ckpt:
        (run / "30" / "model" / "_METADATA").unlink()
        ckpt.restore(STATE)
        ckpt.save(30, STATE)
    assert "left in quarantine" in str(ct.repair(run))


def test_repair_says_what_it_cannot_rebuild(run):
    flip_bit(largest_file(run / "30"))
    name = largest_file(run / "30").relative_to(run / "30").as_posix()
    (layout.get_spare_directory(run, 3) / name).unlink()
    report = ct.repair(run)
    assert f"damaged: {name}; cannot be rebuilt" in str(report)


def test_repair_restores_the_pins_or_starts_a_new_list(run):
    catalogue.write_pins(run, frozenset({20}))
    layout.get_control_path(run, "pins.json").write_text("{")
    assert "restored from its second copy: [20]" in str(ct.repair(run))
    assert catalogue.has_intact_pins(run)
    for name in ("pins.json", "pins.second.json"):
        layout.get_control_path(run, name).write_text("{")
    assert "replaced by an empty list" in str(ct.repair(run))
    assert catalogue.has_intact_pins(run)


def test_repair_refuses_a_missing_directory_and_a_run_in_use(run, tmp_path):
    with pytest.raises(ct.StorageError, match="does not exist"):
        ct.repair(tmp_path / "nothing")
    with ct.open(spec_for(run)) as ckpt:
        ckpt.restore(STATE)
        ckpt.steps(99)
        with pytest.raises(ct.RunInUseError):
            ct.repair(run)
        assert str(ct.repair(run, dry_run=True)) == "nothing to repair"


@pytest.mark.parametrize("thing", ["folder", "pipe", "link"])
def test_repair_puts_a_file_back_where_something_else_stands(run, tmp_path_factory, thing):
    victim = tmp_path_factory.mktemp("outside") / "victim"
    victim.write_text("gold")
    for name in ("commit_success.txt", layout.MANIFEST):
        place = run / "20" / name
        place.unlink()
        {"folder": place.mkdir, "pipe": lambda at=place: os.mkfifo(at), "link": lambda at=place: at.symlink_to(victim)}[
            thing
        ]()
    assert "20/commit_success.txt: damaged or missing; restored" in str(ct.repair(run))
    assert ct.verify(run).ok
    assert victim.read_text() == "gold"
    assert str(ct.repair(run)) == "nothing to repair", "what stood there is kept and is no step"


def test_repair_writes_nothing_through_a_linked_directory(run, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside") / "20"
    (run / "20").rename(outside)
    (run / "20").symlink_to(outside)
    (outside / "commit_success.txt").write_text("gold")
    assert "20 is a link" in str(ct.repair(run))
    assert (outside / "commit_success.txt").read_text() == "gold"


def test_a_lock_that_cannot_be_opened_is_a_storage_error(run):
    layout.get_control_path(run, "lock").unlink()
    layout.get_control_path(run, "lock").mkdir()
    with pytest.raises(ct.StorageError, match="cannot be opened"):
        ct.repair(run)
