# SPDX-License-Identifier: Apache-2.0
"""`verify` finds damage, names it, and changes nothing."""

import pytest

import ckpttools as ct
from ckpttools.store import commit, file_integrity
from tests.ckpttools.restore.test_first_intact import flip_bit, largest_file
from tests.ckpttools.tools.runs import snapshot_of


def test_verify_finds_nothing_in_a_healthy_run_and_changes_nothing(run):
    before = snapshot_of(run)
    report = ct.verify(run)
    assert report.ok
    assert [step.state for step in report.steps] == ["intact"] * 3
    assert report.as_dict()["ok"] is True
    assert str(ct.verify(run, 20)) == "step 20: intact"
    assert snapshot_of(run) == before


def test_verify_names_the_damaged_file_and_leaf(run):
    flip_bit(largest_file(run / "30" / "model"))
    flip_bit(run / "20" / "commit_success.txt")
    (run / "10" / "ckpttools.manifest").unlink()
    ten, twenty, thirty = ct.verify(run).steps
    assert thirty.state == "corrupt"
    assert thirty.leaves == ("model.large",)
    assert thirty.files[0].startswith("model/ocdbt.process_0/d/")
    assert twenty.files == ("commit_success.txt",)
    assert "all leaves are still readable" in twenty.reason
    assert ten.state == "incomplete"
    assert "10 has no ckpttools.manifest" in ten.reason
    assert not ct.verify(run).ok


def test_verify_of_an_empty_directory(tmp_path):
    assert str(ct.verify(tmp_path)) == f"no steps: {tmp_path} is an empty directory."
    assert not ct.verify(tmp_path).ok


@pytest.mark.parametrize("tool", ["verify", "repair", "adopt", "prune"])
def test_a_misspelt_run_is_neither_intact_nor_created(tmp_path, tool):
    more = [ct.Latest(1)] if tool == "prune" else []
    with pytest.raises(ct.StorageError, match="does not exist"):
        getattr(ct, tool)(tmp_path / "typo", *more)
    assert not (tmp_path / "typo").exists()


def test_verify_reports_its_progress_in_bytes(run):
    seen = []
    ct.verify(run, progress=lambda done, total: seen.append((done, total)))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1][0] == seen[-1][1] == sum(row.total_bytes for row in ct.ls(run))


def test_a_step_deleted_during_verify_is_not_called_damaged(run, monkeypatch):
    original = file_integrity.find_damaged_files

    def and_then_gone(entry, *args):
        if entry.step == 10 and entry.path.exists():
            commit.discard(run, entry.path)
        return original(entry, *args)

    monkeypatch.setattr(file_integrity, "find_damaged_files", and_then_gone)
    report = ct.verify(run)
    assert [step.step for step in report.steps] == [20, 30]
    assert report.ok
