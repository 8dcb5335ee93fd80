# SPDX-License-Identifier: Apache-2.0
"""`prune` says what it deletes and why; quarantine is emptied on request only."""

import ckpttools as ct
from ckpttools.store import layout
from tests.ckpttools.restore.test_first_intact import STATE, flip_bit, largest_file, restore, spec_for


def test_prune_says_what_it_would_delete_and_why(run):
    verdicts = ct.prune(run, ct.Latest(1), dry_run=True)
    assert [(v.step.step, v.keep) for v in verdicts] == [(10, False), (20, True), (30, True)]
    assert (run / "10").exists()
    ct.prune(run, ct.Latest(1))
    assert not (run / "10").exists()
    assert not layout.get_spare_directory(run, 1).exists()


def test_a_dry_run_says_what_expires_on_a_branch(run):
    with ct.open(spec_for(run)) as ckpt:
        ckpt.restore(STATE, step=10)
        ckpt.save(15, STATE)
        ckpt.save(20, STATE)
    verdicts = [(v.step.step, v.step.superseded, v.keep) for v in ct.prune(run, ct.Latest(1), dry_run=True)]
    assert verdicts == [(10, False, False), (20, True, True), (30, True, True), (15, False, True), (20, False, True)]
    with ct.open(spec_for(run)) as ckpt:
        ckpt.restore(STATE)
        ckpt.save(25, STATE)
    reasons = {v.step.sequence: v.reason for v in ct.prune(run, ct.Latest(1), dry_run=True) if not v.keep}
    assert reasons[2] == "superseded, and the run has passed it"
    assert len(ct.ls(run)) == 6
    ct.prune(run, ct.Latest(1))
    assert [(row.step, row.state) for row in ct.ls(run)] == [(30, "superseded"), (20, "committed"), (25, "committed")]


def test_quarantine_is_emptied_only_after_the_run_went_on(run):
    flip_bit(largest_file(run / "30" / "model"))
    assert restore(run).step == 20
    assert ct.empty_quarantine(run) == (), "it tells which branch the run is on"
    with ct.open(spec_for(run)) as ckpt:
        ckpt.restore(STATE)
        ckpt.save(25, STATE)
    assert ct.empty_quarantine(run, dry_run=True) == ("30",)
    assert (layout.get_control_path(run, "quarantine") / "30").is_dir()
    assert ct.empty_quarantine(run) == ("30",)
    assert not list(layout.get_control_path(run, "quarantine").iterdir())
    assert sorted(path.name for path in layout.get_control_path(run, "spare").iterdir()) == ["1", "2", "4"]
    assert [row.step for row in ct.ls(run)] == [10, 20, 25]
