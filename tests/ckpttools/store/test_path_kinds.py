# SPDX-License-Identifier: Apache-2.0
"""Whatever a path is, it is said, and a run begins only where nothing else lies."""

import numpy as np
import pytest

import ckpttools as ct
from ckpttools.cli.main import main
from ckpttools.store import path_kinds
from tests.ckpttools.restore.test_first_intact import spec_for
from tests.ckpttools.store.writers import RUNS, SINGLES, write, write_unfinished
from tests.ckpttools.tools.runs import snapshot_of


@pytest.fixture
def run(tmp_path):
    with ct.open(spec_for(tmp_path / "run")) as ckpt:
        for step in (10, 20):
            ckpt.save(step, {"model": {"w": np.full(3, float(step))}})
    return tmp_path / "run"


@pytest.mark.parametrize(
    ("place", "kind", "text"),
    [
        (".", "run", "is a run"),
        ("10", "step", "is step 10 of a run"),
        ("10/model", "inside", "is the item 'model' of step 10 of the run"),
        ("10/model/d", "inside", "is inside step 10"),
        ("10/new", "inside", "is inside step 10"),
        ("10/ckpttools.manifest", "inside", "is inside step 10"),
        (".ckpttools/staging", "inside", "is in the control directory of"),
        ("30", "missing", "does not exist"),
        ("file", "file", "is a file, not a directory"),
        ("empty", "empty", "is an empty directory"),
        ("logs", "unknown", "contains no steps, only a.txt"),
    ],
)
def test_what_lies_at_a_path_is_said(run, place, kind, text):
    (run / "file").write_text("x")
    (run / "empty").mkdir()
    (run / "logs").mkdir()
    (run / "logs" / "a.txt").write_text("x")
    found = path_kinds.identify(run / place)
    assert found.kind == kind
    assert found.text.startswith(str(run))
    assert text in found.text


@pytest.mark.parametrize("place", ["10", "10/model", "10/new", "10/model/d/new", ".ckpttools/new", "file"])
def test_a_run_does_not_begin_inside_another(run, place):
    (run / "file").write_text("x")
    before = snapshot_of(run)
    with pytest.raises(ct.NotARunError) as caught:
        ct.open(ct.CheckpointSpec(directory=run / place))
    assert str(run) in caught.value.what
    assert str(run) in caught.value.fix or "check the path" in caught.value.fix
    assert snapshot_of(run) == before
    assert ct.verify(run).ok


@pytest.mark.parametrize("place", [".", "empty", "other", "other/deeper"])
def test_a_run_begins_in_a_free_directory(run, place):
    """Control."""
    (run.parent / "empty").mkdir()
    directory = run if place == "." else run.parent / place
    with ct.open(ct.CheckpointSpec(directory=directory)) as ckpt:
        assert ckpt.latest_step() == (20 if place == "." else None)


@pytest.mark.parametrize("name", ["manager, padded", "pytree", "flax", "v1 trainer", "standard"])
def test_no_run_begins_beside_another_writers(tmp_path, name):
    write(RUNS[name], tmp_path / "run")
    before = snapshot_of(tmp_path)
    with pytest.raises(ct.NotARunError, match=r"2 step\(s\) written by .*10.*, .*20") as caught:
        ct.open(ct.CheckpointSpec(directory=tmp_path / "run"))
    assert f"ckpttools adopt {tmp_path / 'run'}" in caught.value.fix
    assert snapshot_of(tmp_path) == before


@pytest.mark.parametrize("name", SINGLES)
def test_no_run_begins_in_or_beside_a_single_checkpoint(tmp_path, name):
    path = write(SINGLES[name], tmp_path / "run" / "best") if name != "to_bytes" else None
    if path is None:
        (tmp_path / "run").mkdir()
        path = write(SINGLES[name], tmp_path / "run" / "best")
    for directory in (tmp_path / "run", path):
        with pytest.raises(ct.NotARunError, match=path.name) as caught:
            ct.open(ct.CheckpointSpec(directory=directory))
        assert f"ct.adopt({str(path)!r}, into=" in caught.value.fix


def test_a_first_save_that_orbax_did_not_finish_is_named(tmp_path):
    write_unfinished(tmp_path / "run")
    with pytest.raises(ct.NotARunError, match=r"did not finish.*10\.orbax-checkpoint-tmp") as caught:
        ct.open(ct.CheckpointSpec(directory=tmp_path / "run"))
    assert "delete it" in caught.value.fix


def test_a_foreign_step_after_our_own_is_not_passed_over(run):
    write(lambda path: RUNS["manager, prefix"](path), run)
    with ct.open(spec_for(run)) as ckpt:
        assert ckpt.latest_step() == 20, "control: our own steps are as new"
    (run / "ckpt_20").rename(run / "ckpt_21")
    with pytest.raises(ct.NotARunError, match="ckpt_10, ckpt_21"):
        ct.open(spec_for(run))


def test_a_step_that_lost_its_manifest_is_not_foreign(run):
    (run / "20" / "ckpttools.manifest").unlink()
    assert path_kinds.identify(run).kind == "run"


def test_a_link_stands_for_what_it_leads_to(run):
    (run.parent / "best").symlink_to(run / "10")
    (run.parent / "item").symlink_to(run / "10" / "model")
    assert ct.load(run.parent / "best", {"model": {"w": np.zeros(3)}}).step == 10
    assert ct.verify(run.parent / "best").ok
    for name in ("best", "item"):
        with pytest.raises(ct.NotARunError, match="step 10"):
            ct.open(ct.CheckpointSpec(directory=run.parent / name))


def test_a_step_is_not_fetched_into_a_step(run):
    with pytest.raises(ct.NotARunError, match="is step 10"):
        ct.fetch_step(run / "10", f"file://{run.parent}/mirror")


@pytest.mark.parametrize("place", ["7", "7/inner", "7/inner/8"])
def test_a_run_cannot_begin_at_the_place_of_a_step(golden, place):
    with pytest.raises(ct.NotARunError, match="the place of step 7 of the run") as caught:
        ct.open(ct.CheckpointSpec(directory=golden / place))
    assert str(golden) in caught.value.fix
    assert not (golden / "7").exists()
    with ct.open(ct.CheckpointSpec(directory=golden / "eval" / "inner")):
        pass  # control: a name that is not a step's


def test_a_run_cannot_begin_at_a_step_of_an_open_run_without_steps(tmp_path):
    with ct.open(ct.CheckpointSpec(directory=tmp_path / "run")), pytest.raises(ct.NotARunError, match="step 7"):
        ct.open(ct.CheckpointSpec(directory=tmp_path / "run" / "7"))


def test_runs_may_be_named_by_numbers(golden, tmp_path):
    (tmp_path / "runs").mkdir()
    golden.rename(tmp_path / "runs" / "1")
    for name in ("1", "2"):
        with ct.open(ct.CheckpointSpec(directory=tmp_path / "runs" / name)):
            pass


@pytest.fixture(params=["named", "numbered", "foreign"])
def runs(request, tmp_path):
    """A directory of runs, and the name of the first."""
    names = ("1", "2") if request.param == "numbered" else ("exp1", "exp2")
    place = tmp_path / "runs"
    (place / "logs").mkdir(parents=True)
    for name in names:
        if request.param == "foreign":
            write(RUNS["manager"], place / name)
        else:
            with ct.open(spec_for(place / name)) as ckpt:
                ckpt.save(10, {"model": {"w": np.zeros(3)}})
    return place, names


def test_a_run_does_not_begin_in_a_directory_of_runs(runs, capsys):
    place, names = runs
    before = snapshot_of(place)
    with pytest.raises(ct.NotARunError) as caught:
        ct.open(ct.CheckpointSpec(directory=place))
    assert caught.value.kind == "parent"
    assert f"contains 2 run(s): {', '.join(names)}" in caught.value.what
    assert str(place / names[0]) in caught.value.fix
    for command in ("ls", "verify", "show", "repair"):
        assert main([command, str(place)]) != 0
        assert "contains 2 run(s)" in "".join(capsys.readouterr())
    assert snapshot_of(place) == before


def test_a_run_beside_others_begins_where_that_is_meant(run):
    place = run.parent
    with pytest.raises(ct.NotARunError):
        ct.open(spec_for(place))
    (place / ".ckpttools").mkdir()
    for step in (1, 2):
        with ct.open(spec_for(place)) as ckpt:
            ckpt.restore({"a": 0})
            ckpt.save(1000 + step, {"a": step})
    assert 1002 in [row.step for row in ct.ls(place)]


def test_a_second_run_inside_the_directory_of_an_open_one_is_no_obstacle(tmp_path):
    """A run and its EMA: the outer one may be interrupted before its first step."""
    with ct.open(spec_for(tmp_path / "exp")), ct.open(spec_for(tmp_path / "exp" / "ema")) as ema:
        ema.save(1, {"a": 1})
    with ct.open(spec_for(tmp_path / "exp")) as ckpt:
        assert ckpt.restore({"a": 0}).step is None
