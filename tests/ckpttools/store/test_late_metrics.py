# SPDX-License-Identifier: Apache-2.0
"""A file with metrics belongs to one step, is whole or damaged, and is removed only when its step is long gone."""

import dataclasses
import math
import os
import pathlib
import time

import pytest

from ckpttools.store import late_metrics, layout
from ckpttools.store.manifest import Summary

STEP = Summary(
    step=3,
    sequence=5,
    saved_at=0.0,
    run_s=0.0,
    metrics={"loss": 1.0},
    lineage=(("root", 0),),
    reason="",
    spec="",
    files={},
)


def find_path(run, name):
    return layout.get_control_path(run, f"metrics/{name}")


def read(run):
    return late_metrics.read_files(run, late_metrics.list_names(run))


def test_metrics_are_read_as_they_were_written(tmp_path):
    assert late_metrics.list_names(tmp_path) == frozenset(), "control: a run without such files"
    before_ns = time.time_ns()
    name = late_metrics.write_file(tmp_path, STEP, {"val": 0.1, "best": -math.inf, "odd": math.nan})
    assert late_metrics.list_names(tmp_path) == {name}
    found = read(tmp_path)[name]
    assert found.key == late_metrics.get_key(STEP)
    assert before_ns <= found.time_ns <= time.time_ns()
    assert (found.metrics["val"], found.metrics["best"]) == (0.1, -math.inf)
    assert math.isnan(found.metrics["odd"])


@pytest.mark.parametrize("field", [{"step": 4}, {"sequence": 6}, {"lineage": (("root", 0), ("other", 2))}], ids=str)
def test_metrics_belong_to_one_commit_of_one_branch(tmp_path, field):
    late_metrics.write_file(tmp_path, STEP, {"val": 0.5})
    other = dataclasses.replace(STEP, **field)
    assert late_metrics.merge(other, read(tmp_path)) is other
    assert late_metrics.merge(STEP, read(tmp_path)).metrics == {"loss": 1.0, "val": 0.5}, "control"


def test_the_later_of_two_files_wins_whatever_the_clock_says(tmp_path, monkeypatch):
    for now, value in ((20, 0.2), (9, 0.9)):
        monkeypatch.setattr(time, "time_ns", lambda now=now: now)
        late_metrics.write_file(tmp_path, STEP, {"val": value, f"only at {now}": 1.0})
    merged = late_metrics.merge(STEP, read(tmp_path))
    assert merged.metrics == {"loss": 1.0, "val": 0.9, "only at 9": 1.0, "only at 20": 1.0}


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[:-1],
        lambda data: data.replace(b"0.5", b"0.9"),
        lambda data: b"[" * 100_000,
        lambda data: b"7",
    ],
    ids=["empty", "cut", "another value", "deep", "a number"],
)
def test_a_damaged_file_names_its_step_and_no_metric(tmp_path, damage):
    name = late_metrics.write_file(tmp_path, STEP, {"val": 0.5})
    assert late_metrics.find_damaged(read(tmp_path)) == frozenset(), "control"
    path = find_path(tmp_path, name)
    path.write_bytes(damage(path.read_bytes()))
    assert late_metrics.find_damaged(read(tmp_path)) == {late_metrics.get_key(STEP)}
    assert late_metrics.merge(STEP, read(tmp_path)) is STEP


def test_a_file_that_was_given_to_another_step_is_damaged(tmp_path):
    name = late_metrics.write_file(tmp_path, STEP, {"val": 0.5})
    data = find_path(tmp_path, name).read_bytes()
    moved = name.replace("3-5-", "4-5-", 1)
    assert late_metrics.parse_file(moved, data).metrics is None
    assert late_metrics.parse_file(name, data).metrics == {"val": 0.5}, "control"


def test_other_files_are_not_metrics(tmp_path):
    name = late_metrics.write_file(tmp_path, STEP, {"val": 0.5})
    for other in (f"{name}.new", "notes.json", f"0{name}", f"-{name}", name.replace(".json", ".txt")):
        find_path(tmp_path, other).write_bytes(b"{}")
        assert not late_metrics.is_file_name(other)
    assert late_metrics.list_names(tmp_path) == {name}


def test_a_file_removed_meanwhile_is_left_out(tmp_path):
    names = {late_metrics.write_file(tmp_path, STEP, {"val": value}) for value in (0.1, 0.2)}
    removed, left = sorted(names)
    late_metrics.remove_file(tmp_path, removed)
    late_metrics.remove_file(tmp_path, removed)
    assert set(late_metrics.read_files(tmp_path, names)) == {left}


def test_a_file_the_disk_does_not_return_counts_as_damaged(tmp_path, monkeypatch):
    name = late_metrics.write_file(tmp_path, STEP, {"val": 0.5})
    real = pathlib.Path.open

    def fail(path, *arguments, **options):
        if path.name == name:
            raise OSError(5, "Input/output error")
        return real(path, *arguments, **options)

    monkeypatch.setattr(pathlib.Path, "open", fail)
    assert read(tmp_path)[name].metrics is None


def test_a_sweep_removes_only_old_files_of_lost_steps(tmp_path):
    gone = dataclasses.replace(STEP, step=7)
    files = {
        "old, gone": late_metrics.write_file(tmp_path, gone, {"val": 0.1}),
        "young, gone": late_metrics.write_file(tmp_path, gone, {"val": 0.2}),
        "old, there": late_metrics.write_file(tmp_path, STEP, {"val": 0.3}),
    }
    files["old, never finished"] = f"{files['old, there']}.new"
    files["old, not ours"] = "notes.json"
    for kind, name in files.items():
        path = find_path(tmp_path, name)
        path.touch()
        if kind.startswith("old"):
            os.utime(path, (0, 0))
    late_metrics.sweep(tmp_path, [STEP], frozenset())
    left = {kind for kind, name in files.items() if find_path(tmp_path, name).exists()}
    assert left == {"young, gone", "old, there", "old, not ours"}
