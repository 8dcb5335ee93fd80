# SPDX-License-Identifier: Apache-2.0
"""Metrics that come after the save: from any process, crash-safe, and counted like all others."""

import concurrent.futures
import math
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

import ckpttools as ct
from ckpttools.cli.main import main
from ckpttools.store import late_metrics, layout

STATE = {"item": {"w": np.ones(4)}}
BEST = ct.Latest(2) | ct.Best("val", mode="min")


def spec_for(directory, **fields):
    return ct.CheckpointSpec(directory=directory, **{"storage": ct.Storage(asynchronous=False), "keep": BEST, **fields})


@pytest.fixture
def run(tmp_path):
    with ct.open(spec_for(tmp_path / "run", keep=ct.All())) as ckpt:
        for step in (1, 2, 3):
            ckpt.save(step, STATE, {"loss": 1.0 / step})
    return tmp_path / "run"


def test_late_metrics_count_everywhere(run):
    assert ct.record(run, 2, {"val": 0.5, "acc": np.float32(0.25)}) == {"loss": 0.5, "val": 0.5, "acc": 0.25}
    assert [step.metrics.get("val") for step in ct.ls(run)] == [None, 0.5, None]
    assert ct.show(run, 2).metrics["acc"] == 0.25
    report = ct.load(run, STATE, step=ct.best("val", mode="min"))
    assert (report.step, report.metrics["val"]) == (2, 0.5)
    with ct.open(spec_for(run)) as ckpt:
        assert ckpt.restore(STATE, step=ct.best("val")).step == 2
        assert ckpt.best_step() == 2
    assert ct.verify(run).ok
    kept = {verdict.step.step: verdict.reason for verdict in ct.prune(run, BEST) if verdict.keep}
    assert kept[2] == "one of the latest 2, one of the best 1 by val"


def test_an_open_session_keeps_what_another_process_called_best(run):
    with ct.open(spec_for(run)) as ckpt:
        ckpt.restore(STATE)
        ckpt.save(4, STATE)  # the lock is held from here on
        subprocess.run(
            [sys.executable, "-m", "ckpttools", "record", str(run), "3", "val=0.5"],
            check=True,
            env={**os.environ, "PYTHONPATH": str(pathlib.Path(ct.__file__).parents[1])},
        )
        assert ckpt.best_step() == 3
        for step in range(5, 9):
            ckpt.save(step, STATE)
        assert ckpt.all_steps() == (3, 7, 8)
        ct.record(run, 8, {"val": 0.25})
        for step in (9, 10):
            ckpt.save(step, STATE)
        assert ckpt.all_steps() == (8, 9, 10)


def test_the_control_without_a_metric_the_step_is_deleted(run):
    with ct.open(spec_for(run)) as ckpt:
        ckpt.restore(STATE)
        for step in range(4, 9):
            ckpt.save(step, STATE)
        assert ckpt.all_steps() == (7, 8)
        with pytest.raises(ct.StepNotFoundError, match=r"step 3 of .* is not committed"):
            ct.record(run, 3, {"val": 0.5})
    assert late_metrics.list_names(run) == frozenset()


def test_another_value_is_refused_unless_it_is_meant(run):
    ct.record(run, 1, {"val": 0.5, "odd": math.nan})
    ct.record(run, 1, {"val": 0.5, "odd": math.nan})  # the same again changes nothing
    assert len(late_metrics.list_names(run)) == 1
    for metrics in ({"val": 0.25, "new": 1.0}, {"loss": 7.0}):
        with pytest.raises(ct.MetricConflictError, match="; nothing was recorded"):
            ct.record(run, 1, metrics)
    assert "new" not in ct.show(run, 1).metrics
    assert ct.record(run, 1, {"val": 0.25, "loss": 7.0}, overwrite=True)["val"] == 0.25
    assert ct.show(run, 1).metrics["loss"] == 7.0


@pytest.mark.parametrize(
    "value",
    ["0.5", b"0.5", None, [0.5], np.ones(2), 1j],
    ids=["text", "bytes", "none", "list", "array", "complex"],
)
def test_a_metric_that_is_not_a_number_is_refused(run, value):
    with pytest.raises(ct.LeafError, match="the metric 'val' is"):
        ct.record(run, 1, {"loss2": 1.0, "val": value})
    assert late_metrics.list_names(run) == frozenset()


def test_nan_is_recorded_and_ranks_last(run):
    ct.record(run, 1, {"val": math.nan})
    ct.record(run, 2, {"val": math.inf})
    assert ct.load(run, STATE, step=ct.best("val", mode="min")).step == 2


@pytest.mark.parametrize("step", [7, "1", True, -1])
def test_a_step_that_does_not_exist_is_named(run, step):
    with pytest.raises(ct.StepNotFoundError, match="committed: 1, 2, 3"):
        ct.record(run, step, {"val": 1.0})


def test_a_number_that_is_used_again_is_another_step(run):
    ct.record(run, 2, {"val": 0.5})
    with ct.open(spec_for(run, keep=ct.All())) as ckpt:
        ckpt.restore(STATE, step=1)
        ckpt.save(2, STATE)
    assert [(step.step, step.state, step.metrics.get("val")) for step in ct.ls(run)][-1] == (2, "committed", None)
    ct.record(run, 2, {"val": 0.75})
    assert [step.metrics.get("val") for step in ct.ls(run)] == [None, 0.5, None, 0.75]


def test_many_processes_record_at_once(run):
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda index: ct.record(run, 1 + index % 3, {f"m{index}": index}), range(48)))
    found = {name: value for step in ct.ls(run) for name, value in step.metrics.items() if name != "loss"}
    assert found == {f"m{index}": index for index in range(48)}


_RECORDER = """
import sys, ckpttools as ct
index = 0
while True:
    ct.record(sys.argv[1], 1, {f"m{index}": index})
    print(index, flush=True)
    index += 1
"""


def test_a_kill_loses_no_metric_that_was_recorded(run):
    environment = {**os.environ, "PYTHONPATH": str(pathlib.Path(ct.__file__).parents[1])}
    for wait_s in (0.0, 0.013, 0.029, 0.041):
        for path in layout.get_control_path(run, "metrics").glob("*"):
            path.unlink()
        with subprocess.Popen(
            [sys.executable, "-c", _RECORDER, str(run)], stdout=subprocess.PIPE, text=True, env=environment
        ) as child:
            child.stdout.readline()
            time.sleep(wait_s)
            child.send_signal(signal.SIGKILL)
            reported = ["0", *child.stdout.read().split()]
        metrics = ct.show(run, 1).metrics
        assert {f"m{index}" for index in range(len(reported))} <= set(metrics)
        assert all(metrics[f"m{index}"] == index for index in range(len(reported)))


@pytest.mark.parametrize(
    "damage", [lambda data: b"", lambda data: data[:-3], lambda data: data.replace(b"0.5", b"0.9")]
)
def test_a_damaged_metric_is_not_believed_and_its_step_kept(run, damage):
    ct.record(run, 1, {"val": 0.5})
    (name,) = late_metrics.list_names(run)
    path = layout.get_control_path(run, f"metrics/{name}")
    path.write_bytes(damage(path.read_bytes()))
    assert "val" not in ct.show(run, 1).metrics
    ct.prune(run, ct.Latest(1))
    assert [step.step for step in ct.ls(run)] == [1, 2, 3]
    with ct.open(spec_for(run, keep=ct.Latest(1))) as ckpt:
        ckpt.restore(STATE)
        ckpt.save(4, STATE)
        assert ckpt.all_steps() == (1, 3, 4)


def test_metrics_reach_the_mirror_and_come_back(run, tmp_path):
    address = f"file://{tmp_path}/copies"
    ct.sync_mirror(run, address)
    ct.record(run, 1, {"val": 0.5})
    ct.sync_mirror(run, ct.Mirror(address, keep=ct.Latest(1) | ct.Best("val", mode="min")))
    ct.sync_mirror(run, ct.Mirror(address, keep=ct.Latest(1) | ct.Best("val", mode="min")))
    names = sorted(path.name.partition("-")[0] for path in (tmp_path / "copies").glob("*-*"))
    assert names == ["1", "2", "3"]  # the best, and the two that are always kept
    ct.fetch_step(tmp_path / "fetched", address, 1)
    assert ct.show(tmp_path / "fetched").metrics["val"] == 0.5


def test_a_session_copies_metrics_and_restores_the_best_copy(tmp_path):
    fields = {"mirror": f"file://{tmp_path}/copies", "keep": ct.All()}
    with ct.open(spec_for(tmp_path / "run", **fields)) as ckpt:
        for step in (1, 2, 3):
            ckpt.save(step, STATE)
        ct.record(tmp_path / "run", 2, {"val": 0.5})
        ckpt.save(4, STATE)
    with ct.open(spec_for(tmp_path / "other", **fields)) as ckpt:
        report = ckpt.restore(STATE, step=ct.best("val", mode="min"))
        assert (report.step, report.metrics) == (2, {"val": 0.5})
        assert ct.show(tmp_path / "other").metrics == {"val": 0.5}


def test_the_command_records(run, capsys):
    assert main(["record", str(run), "2", "val=0.5", "acc=nan"]) == 0
    assert capsys.readouterr().out == "step 2: loss=0.5, val=0.5, acc=nan\n"
    assert main(["record", str(run), "2", "val=0.25"]) != 0
    assert "overwrite=True" in capsys.readouterr().err
    assert main(["record", str(run), "2", "val=0.25", "--overwrite"]) == 0
    assert main(["record", str(run), "2", "val=good"]) != 0
    assert "'good' is not a number" in capsys.readouterr().err


def test_a_control_directory_that_is_a_link_is_refused(run, tmp_path):
    (tmp_path / "outside").mkdir()
    layout.get_control_path(run, "metrics").symlink_to(tmp_path / "outside")
    with pytest.raises(ct.StorageError, match="is a link"):
        ct.record(run, 1, {"val": 1.0})
    assert not list((tmp_path / "outside").iterdir())


@pytest.mark.parametrize("name", ["", "x" * 201], ids=["empty", "long"])
def test_a_metric_needs_a_name_of_sane_length(run, name):
    with pytest.raises(ct.LeafError, match="a metric is named"):
        ct.record(run, 1, {name: 1.0})
    assert late_metrics.list_names(run) == frozenset()
    ct.record(run, 1, {"x" * 200: 1.0})  # control
    assert ct.show(run, 1).metrics["x" * 200] == 1.0


def test_more_metrics_than_are_read_back_are_refused(run):
    with pytest.raises(ct.LeafError, match="nothing was recorded"):
        ct.record(run, 1, {f"{index:0200}": 1.0 for index in range(6_000)})
    assert late_metrics.list_names(run) == frozenset()


def test_overwriting_wins_on_a_machine_whose_clock_is_behind(run, monkeypatch):
    ct.record(run, 1, {"val": 1.0})
    now_ns = time.time_ns()
    monkeypatch.setattr(time, "time_ns", lambda: now_ns - 10**12)
    ct.record(run, 1, {"val": 0.5}, overwrite=True)
    assert ct.show(run, 1).metrics["val"] == 0.5


@pytest.mark.parametrize("reason", ["quarantine", "unmounted", "control"])
def test_metrics_of_a_step_that_may_come_back_stay(run, tmp_path, reason):
    ct.record(run, 1, {"val": 0.5})
    for path in layout.get_control_path(run, "metrics").iterdir():
        os.utime(path, (0, 0))
    aside = layout.get_control_path(run, "quarantine") if reason == "quarantine" else tmp_path / "disk"
    aside.mkdir(exist_ok=True)
    (run / "1").rename(aside / "1")
    if reason == "unmounted":
        (run / "1").symlink_to(aside / "1")
        aside.rename(tmp_path / "gone")
    with ct.open(spec_for(run, keep=ct.Latest(2))) as ckpt:
        ckpt.restore(STATE)
        for step in (4, 5):
            ckpt.save(step, STATE)
    assert len(late_metrics.list_names(run)) == (0 if reason == "control" else 1)
