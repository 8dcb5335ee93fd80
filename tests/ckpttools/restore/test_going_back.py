# SPDX-License-Identifier: Apache-2.0
"""Going back: which step a restore takes, what its report says, and what errors name."""

import shutil

import numpy as np
import pytest

import ckpttools as ct
from ckpttools.save import write_step
from ckpttools.store import layout
from tests.ckpttools.restore.test_first_intact import flip_bit, largest_file

pytestmark = pytest.mark.filterwarnings("ignore:.*damaged step.*were passed over")


def state(value=0):
    return {"model": {"w": np.full(2048, value, np.int32)}}


def spec_for(directory, **changes):
    return ct.CheckpointSpec(directory=directory, storage=ct.Storage(asynchronous=False), **changes)


def value_of(report):
    return int(report.state["model"]["w"][0])


def restore(directory, **options):
    with ct.open(spec_for(directory)) as ckpt:
        return ckpt.restore(state(), **options)


def go_back(directory, to, *steps, **changes):
    with ct.open(spec_for(directory, **changes)) as ckpt:
        report = ckpt.restore(state(), step=to)
        for step in steps:
            ckpt.save(step, state(-step))
    return report


@pytest.fixture
def run(tmp_path):
    """30, 40 and 50: what `Latest(3)` keeps of five saves."""
    with ct.open(spec_for(tmp_path)) as ckpt:
        for step in (10, 20, 30, 40, 50):
            ckpt.save(step, state(step))
    return tmp_path


def damage(path):
    flip_bit(largest_file(path / "model"))


def test_the_base_stays_until_two_steps_follow_it(run):
    go_back(run, 30, 35, keep=ct.Latest(1))
    damage(run / "35")
    assert restore(run).step == 30
    go_back(run, 30, 35, 45, keep=ct.Latest(1))
    assert [row.step for row in ct.ls(run) if row.state == "committed"] == [35, 45]


def test_a_restore_says_what_the_next_save_supersedes(run):
    assert go_back(run, 50).candidates[0].supersedes == ()
    report = go_back(run, 30, 35)
    assert report.candidates[0].supersedes == (40, 50)
    assert "the next save begins a branch and supersedes 40, 50" in str(report)
    report = go_back(run, 50)
    assert report.candidates[0].superseded
    assert report.candidates[0].supersedes == (35,)
    assert f"superseded: the run returns to branch {report.candidates[0].branch}" in str(report)
    assert report.as_dict()["candidates"][0]["supersedes"] == (35,)


def test_restoring_the_newest_step_begins_no_branch(run):
    go_back(run, 50, 60)
    assert len({row.branch for row in ct.ls(run)}) == 1


def test_a_crash_before_a_branch_saves_changes_nothing(run):
    go_back(run, 30)
    assert restore(run).step == 50
    assert {row.state for row in ct.ls(run)} == {"committed"}


def test_a_superseded_step_returns_to_its_branch(run):
    go_back(run, 30, 40)
    assert value_of(restore(run, step=40)) == -40, "the live step of that number"
    left = ct.ls(run)[1]
    assert (left.step, left.state) == (40, "superseded")
    report = go_back(run, ct.BranchStep(40, left.branch), 45)
    assert value_of(report) == 40
    rows = {(row.step, row.branch == left.branch): row.state for row in ct.ls(run)}
    assert rows[30, True] == rows[40, True] == "committed"
    assert rows[50, True] == rows[40, False] == "superseded"
    assert value_of(restore(run, step=40)) == 40, "live again, though another 40 is in its place"
    assert ct.show(run, 40).lineage == ((left.branch, 0),)


def test_a_rollback_of_a_rollback(run):
    go_back(run, 40, 45)
    go_back(run, 30, 35)
    live = [row for row in ct.ls(run) if row.state == "committed"]
    assert [(row.step, [start for _, start in row.lineage]) for row in live] == [(30, [0]), (35, [0, 30])]
    assert {row.step for row in ct.ls(run) if row.state == "superseded"} == {40, 45, 50}


def test_without_an_intact_live_step_the_error_names_superseded_ones(run):
    go_back(run, 30, 40)
    damage(run / "30")
    damage(run / "40")
    with pytest.raises(ct.NoIntactStepError) as caught:
        restore(run)
    assert "none of the 2 live step(s)" in caught.value.what
    assert "step 40: committed, but superseded (branch" in caught.value.what
    assert caught.value.fix.startswith("ckpt.restore(state, step=50) returns to the superseded branch")
    assert restore(run, step=50).step == 50
    with pytest.raises(ct.NoIntactStepError, match="superseded"):
        ct.load(run, state())


def test_the_error_gives_the_branch_of_an_ambiguous_number(run):
    go_back(run, 40, 50)
    for step in (30, 40, 50):
        (run / str(step) / layout.MANIFEST).write_bytes(b"{}")
    with pytest.raises(ct.NoIntactStepError) as caught:
        restore(run)
    (left,) = [row for row in ct.ls(run) if row.state == "superseded"]
    assert f"step=ct.BranchStep(50, {left.branch!r})" in caught.value.fix
    assert value_of(restore(run, step=ct.BranchStep(50, left.branch))) == 50
    with pytest.raises(ct.StepDamagedError):
        restore(run, step=50)


def test_a_branch_without_steps_is_not_a_fresh_start(run):
    go_back(run, 30, 35)
    damage(run / "35")
    assert restore(run).step == 30
    shutil.rmtree(run / "30")
    with pytest.raises(ct.StepNotFoundError, match="available: superseded: 40, 50"):
        restore(run)
    assert go_back(run, 50, 60).step == 50
    assert restore(run).step == 60


def test_a_missing_step_or_branch_is_answered_with_what_exists(run):
    go_back(run, 30, 35)
    with pytest.raises(ct.StepNotFoundError, match=r"available: 30, 35; superseded: 40, 50"):
        restore(run, step=20)
    with pytest.raises(ct.StepNotFoundError, match=r"available: 30, 35; superseded: 40, 50"):
        ct.show(run, 20)
    with pytest.raises(ct.StepNotFoundError, match="branches with this step: "):
        restore(run, step=ct.BranchStep(40, "another"))


def test_making_room_spares_the_step_that_the_save_continues_from(run, monkeypatch):
    """Before the first save of a branch is committed, its base is an old step like any other."""
    full = iter([True, True])
    real = write_step.require_space

    def require_space(*args):
        if next(full, False):
            raise ct.DiskSpaceError(what="full.", why="a test.", fix="none.")
        return real(*args)

    with ct.open(spec_for(run, keep=ct.Latest(1))) as ckpt:
        ckpt.restore(state(), step=30)
    spec = ct.CheckpointSpec(
        directory=run, keep=ct.Latest(1), storage=ct.Storage(asynchronous=False, when_full="prune")
    )
    monkeypatch.setattr(write_step, "require_space", require_space)
    with ct.open(spec) as ckpt:
        ckpt.restore(state(), step=30)
        ckpt.save(35, state(-35))
        assert ckpt.all_steps() == (30, 35)


def test_a_damaged_superseded_step_is_not_tried(run):
    go_back(run, 30, 35)
    (run / "50" / layout.MANIFEST).write_bytes(b"{}")
    report = restore(run)
    assert (report.step, report.damaged) == (35, 0)
    (row,) = [row for row in ct.ls(run) if row.state == "corrupt"]
    assert row.branch == ct.ls(run)[0].branch, "its second copy names its branch"
