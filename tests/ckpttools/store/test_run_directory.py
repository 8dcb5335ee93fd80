# SPDX-License-Identifier: Apache-2.0
"""A run's directory as one object: pins, retention, deletion and lineage, on a run of two steps."""

import shutil
import threading

import pytest

import ckpttools as ct
from ckpttools.store import catalogue, commit, layout
from ckpttools.store.run_directory import RunDirectory, require_run_directory


@pytest.fixture
def run(golden):
    run = RunDirectory(golden)
    run.lock_for_writing()
    yield run
    run.lock.release()


def find(run, step):
    return next(entry for entry in run.refresh_steps().entries if entry.step == step)


def get_numbers(run):
    return [entry.step for entry in run.refresh_steps().committed_entries]


def test_a_missing_directory_is_not_an_empty_run(tmp_path):
    assert require_run_directory(str(tmp_path)) == tmp_path
    with pytest.raises(ct.StorageError, match="does not exist"):
        require_run_directory(tmp_path / "misspelt")


def test_a_run_is_used_once_it_has_a_numbered_directory(tmp_path):
    run = RunDirectory(tmp_path / "run")
    assert not run.is_used()
    (tmp_path / "run" / "logs").mkdir(parents=True)
    assert not run.is_used(), "control: any other directory"
    (tmp_path / "run" / "7").mkdir()
    assert run.is_used()


def test_a_reader_sees_new_steps_only_when_it_refreshes(golden):
    reader = RunDirectory(golden)
    assert get_numbers(reader) == [1, 2]
    (golden / "2").rename(golden.parent / "2")
    assert [entry.step for entry in reader.get_steps().entries] == [1, 2], "as they were last read"
    assert get_numbers(reader) == [1]


def test_a_second_writer_is_refused(run):
    with pytest.raises(ct.RunInUseError):
        RunDirectory(run.directory).lock_for_writing()
    run.lock.release()
    second = RunDirectory(run.directory)  # control
    second.lock_for_writing()
    second.lock.release()


def test_only_committed_steps_can_be_pinned(run):
    with pytest.raises(ct.StepNotFoundError, match="step 99 cannot be pinned") as caught:
        run.pin(99, pinned=True)
    assert caught.value.fix == "committed: 1, 2."
    run.pin(2, pinned=True)
    run.pin(1, pinned=False)
    assert {entry.step: entry.info.pinned for entry in run.get_steps().entries} == {1: False, 2: True}
    run.pin(99, pinned=False)  # a step that is gone can be unpinned


def test_pruning_keeps_pins_and_deletes_second_copies(tmp_path):
    with ct.open(ct.CheckpointSpec(directory=tmp_path, keep=ct.All())) as ckpt:
        for step in (10, 20, 30, 40):
            ckpt.save(step, {"count": step})
        ckpt.pin(10)
    run = RunDirectory(tmp_path)
    verdicts = {verdict.step.step: verdict.keep for verdict in run.decide_retention(ct.Latest(2))}
    assert verdicts == {10: True, 20: False, 30: True, 40: True}
    assert run.prune(ct.Latest(2)) == (20,)
    assert get_numbers(run) == [10, 30, 40]
    assert not (tmp_path / "20").exists()
    assert not layout.get_spare_directory(tmp_path, 2).exists()
    assert layout.get_spare_directory(tmp_path, 3).is_dir(), "control"


def test_a_step_deleted_by_hand_is_noticed_before_pruning(run):
    assert get_numbers(run) == [1, 2]
    shutil.rmtree(run.directory / "2")
    assert [entry.step for entry in run.get_steps().entries] == [1, 2], "control: as they were last read"
    assert run.prune(ct.All()) == ()
    assert [entry.step for entry in run.get_steps().entries] == [1]


def test_the_newest_step_is_never_deleted(run):
    with pytest.raises(ct.StepOrderError, match="step 2 is the newest"):
        run.delete(2)
    with pytest.raises(ct.StepNotFoundError, match="step 7 cannot be deleted"):
        run.delete(7)
    run.delete(1)
    assert get_numbers(run) == [2]


def test_a_quarantined_step_is_emptied_once_the_run_went_on(run):
    moved = run.quarantine(find(run, 1))
    assert moved == layout.get_control_path(run.directory, "quarantine") / "1"
    assert run.list_quarantined() == [moved], "step 2 was committed after it"
    assert layout.get_spare_directory(run.directory, 1).is_dir(), "control"
    assert run.empty_quarantine() == ("1",)
    assert not moved.exists()
    assert not layout.get_spare_directory(run.directory, 1).exists(), "its second copies are deleted, too"
    newest = run.quarantine(find(run, 2))
    assert run.empty_quarantine() == (), "no step was committed after it"
    assert newest.is_dir()


def test_a_reader_quarantines_nothing_while_a_writer_has_the_lock(run):
    assert RunDirectory(run.directory).quarantine(find(run, 1)) is None
    assert (run.directory / "1").is_dir()


@pytest.mark.parametrize("had_manifest", [True, False], ids=["bytes", "manifest"])
def test_a_step_replaced_since_it_was_found_damaged_stays(golden, tmp_path, had_manifest):
    shutil.copytree(golden / "1", tmp_path / "copy")
    if not had_manifest:
        (golden / "1" / layout.MANIFEST).unlink()
    reader = RunDirectory(golden)
    damaged = find(reader, 1)
    shutil.move(golden / "1", tmp_path / "damaged")
    shutil.copytree(tmp_path / "copy", golden / "1")
    assert reader.quarantine(damaged) is None, "the same step, fetched or repaired by another process"
    assert (golden / "1").is_dir()
    shutil.move(golden / "1", tmp_path / "intact")
    shutil.move(tmp_path / "damaged", golden / "1")
    assert reader.quarantine(damaged) is not None, "control: the damaged one"


def test_lineage_branches_only_if_the_run_went_on(run):
    lineage = run.get_steps().lineage
    assert run.derive_lineage(2, lineage) == lineage
    *before, (name, start) = run.derive_lineage(1, lineage)
    assert (tuple(before), start) == (lineage, 1)
    assert name != lineage[-1][0]


def test_a_step_belongs_to_the_branches_that_led_to_it(run):
    lineage = run.get_steps().lineage
    assert run.has_step(2, lineage)
    assert not run.has_step(3, lineage)
    branch = (*lineage, ("other", 1))
    assert run.has_step(1, branch)
    assert not run.has_step(2, branch), "the branch began before it"


def test_an_empty_run_starts_a_lineage(tmp_path):
    ((name, start),) = RunDirectory(tmp_path).derive_lineage(0, ())
    assert name
    assert start == 0


def test_pins_of_several_processes_are_all_kept(golden, monkeypatch):
    other, write, others = RunDirectory(golden), catalogue.write_pins, []

    def write_beside_another(root, pins):
        if not others:
            others.append(threading.Thread(target=lambda: other.pin(2, pinned=True)))
            others[0].start()
            others[0].join(0.2)
        write(root, pins)

    RunDirectory(golden).pin(1, pinned=False)
    monkeypatch.setattr(catalogue, "write_pins", write_beside_another)
    RunDirectory(golden).pin(1, pinned=True)
    others[0].join()
    assert catalogue.read_pins(golden) == {1, 2}


def test_several_pins_are_all_or_nothing(run):
    with pytest.raises(ct.StepNotFoundError, match="step 77 cannot be pinned"):
        run.pin(2, 77, pinned=True)
    assert catalogue.read_pins(run.directory) == {1}
    run.pin(1, 2, pinned=True)
    assert catalogue.read_pins(run.directory) == {1, 2}, "control"


@pytest.fixture
def writer(tmp_path):
    with ct.open(ct.CheckpointSpec(directory=tmp_path, keep=ct.All())) as ckpt:
        for step in (10, 20, 30):
            ckpt.save(step, {"count": step}, {"acc": float(step)})
    writer = RunDirectory(tmp_path)
    with writer.hold_for_writing():
        yield writer


def test_a_writer_obeys_the_pin_of_another_process(writer):
    writer.get_steps()
    RunDirectory(writer.directory).pin(10, pinned=True)
    assert writer.prune(ct.Latest(1)) == (), "20 is one of the two newest"
    RunDirectory(writer.directory).pin(10, pinned=False)
    assert writer.prune(ct.Latest(1)) == (10,), "control"


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("act", ["pin", "record"])
def test_a_step_is_not_deleted_beside_a_pin_or_metric(writer, monkeypatch, act, when):
    root, move, outcomes = writer.directory, commit.move_to_trash, []

    def interfere():
        try:
            if act == "pin":
                RunDirectory(root).pin(10, pinned=True)
            else:
                ct.record(root, 10, {"acc": 99.0}, overwrite=True)
            outcomes.append("done")
        except ct.StepNotFoundError:
            outcomes.append("refused")

    def move_beside(*args):
        if outcomes:
            return move(*args)
        interfere() if when == "before" else None
        moved = move(*args)
        interfere() if when == "after" else None
        return moved

    monkeypatch.setattr(commit, "move_to_trash", move_beside)
    deleted = writer.prune(ct.Best("acc", mode="max"))
    assert outcomes == ["done" if when == "before" else "refused"]
    assert (10 in deleted) == (when == "after") == (not (root / "10").exists())
    assert 10 not in catalogue.read_pins(root) or when == "before"


def test_a_step_removed_by_hand_is_saved_again(writer):
    lineage = writer.get_steps().lineage
    assert writer.has_step(30, lineage), "control"
    shutil.rmtree(writer.directory / "30")
    assert not writer.has_step(30, lineage)
    assert get_numbers(writer) == [10, 20]


def test_steps_removed_by_hand_are_not_listed(writer):
    assert get_numbers(writer) == [10, 20, 30], "control"
    shutil.rmtree(writer.directory / "20")
    assert get_numbers(writer) == [10, 30]


def test_a_run_of_which_only_superseded_steps_are_left_is_used(tmp_path):
    spec = ct.CheckpointSpec(directory=tmp_path, storage=ct.Storage(asynchronous=False), keep=ct.All())
    with ct.open(spec) as ckpt:
        for step in (1, 2):
            ckpt.save(step, {"count": step})
        ckpt.restore({"count": 0}, step=1)
        ckpt.save(2, {"count": 22})
    shutil.rmtree(tmp_path / "1")
    shutil.rmtree(tmp_path / "2")
    assert RunDirectory(tmp_path).is_used()
    with ct.open(spec) as ckpt, pytest.raises(ct.NotRestoredError):
        ckpt.save(1, {"count": 1})
    shutil.rmtree(layout.get_control_path(tmp_path, "superseded"))
    assert not RunDirectory(tmp_path).is_used(), "control"


def test_a_file_with_the_name_of_a_step_is_moved_aside(tmp_path):
    (tmp_path / "7").write_text("mine")
    with ct.open(ct.CheckpointSpec(directory=tmp_path, storage=ct.Storage(asynchronous=False))) as ckpt:
        assert ckpt.restore({"count": 0}).step is None
        ckpt.save(7, {"count": 7})
        assert ckpt.all_steps() == (7,)
    assert (layout.get_control_path(tmp_path, "quarantine") / "7").read_text() == "mine"
    run = RunDirectory(tmp_path)
    with run.hold_for_writing():
        assert run.empty_quarantine() == ("7",)
    assert not list(layout.get_control_path(tmp_path, "trash").iterdir())
