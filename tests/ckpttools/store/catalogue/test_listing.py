# SPDX-License-Identifier: Apache-2.0
"""The list of steps is made from the steps: branches, superseded steps, a thousand of them."""

import json
import shutil

import jax.numpy as jnp
import pytest

import ckpttools as ct
from ckpttools.store import digest, layout


def state(value=0.0):
    return {"model": {"w": jnp.full(4, float(value))}}


def spec_for(folder, **changes):
    return ct.CheckpointSpec(directory=folder, **{"keep": ct.All(), **changes})


@pytest.fixture
def run(tmp_path):
    with ct.open(spec_for(tmp_path)) as ckpt:
        for step in (60, 70, 80, 100):
            ckpt.save(step, state(step))
    return tmp_path


def test_going_back_begins_a_branch_with_its_first_save(run):
    with ct.open(spec_for(run)) as ckpt:
        assert ckpt.restore(state(), step=60).step == 60
        assert ckpt.all_steps() == (60, 70, 80, 100), "looking back is no decision"
        ckpt.save(70, state(-70))
        ckpt.wait()
        assert ckpt.all_steps() == (60, 70)
        assert ckpt.latest_step() == 70
    rows = [(row.step, row.state, row.began_after) for row in ct.ls(run)]
    assert rows == [
        (60, "committed", 0),
        (70, "superseded", 0),
        (80, "superseded", 0),
        (100, "superseded", 0),
        (70, "committed", 60),
    ]
    with ct.open(spec_for(run)) as ckpt:
        report = ckpt.restore(state())
        assert report.step == 70
        assert float(report.state["model"]["w"][0]) == -70
        assert float(ckpt.restore(state(), step=60).state["model"]["w"][0]) == 60


def test_superseded_steps_can_be_restored_until_retention_deletes_them(run):
    with ct.open(spec_for(run)) as ckpt:
        ckpt.restore(state(), step=60)
        ckpt.save(65, state(-65))
    with ct.open(spec_for(run, keep=ct.Latest(2))) as ckpt:
        assert float(ckpt.restore(state(), step=100).state["model"]["w"][0]) == 100
        ckpt.restore(state())
        saved = ckpt.save(66, state(-66), reason="x")
        assert isinstance(saved, ct.Started)
        assert ckpt.wait().deleted == (60, 70), "two live steps, and two of the branch that was left"
        assert ckpt.all_steps() == (65, 66)
        ckpt.save(80, state(-80))
        ckpt.save(100, state(-100))
        assert ckpt.wait().deleted == (66, 80), "80 is passed by the new 80 and 100"
        ckpt.save(110, state(-110))
        assert ckpt.wait().deleted == (80, 100)
        assert [(row.step, row.state) for row in ct.ls(run)] == [(100, "committed"), (110, "committed")]


def test_a_branch_of_a_branch(run):
    with ct.open(spec_for(run)) as ckpt:
        ckpt.restore(state(), step=80)
        for step in (85, 90):
            ckpt.save(step, state(step))
        ckpt.restore(state(), step=85)
        ckpt.save(88, state(88))
        ckpt.wait()
        assert ckpt.all_steps() == (60, 70, 80, 85, 88)
    with ct.open(spec_for(run)) as ckpt:
        assert ckpt.all_steps() == (60, 70, 80, 85, 88)


def test_opening_a_thousand_steps_reads_summaries_and_no_leaf(tmp_path, monkeypatch):
    """Its seconds are in benchmarks/ckpt_speed.py; what they come from is counted here."""
    with ct.open(spec_for(tmp_path)) as ckpt:
        ckpt.save(1, {"model": {f"layer{n}": jnp.ones(2) for n in range(20)}})
    lines = (tmp_path / "1" / layout.MANIFEST).read_bytes().split(b"\n")
    summary = json.loads(lines[1])
    for step in range(2, 1001):
        folder = tmp_path / str(step)
        shutil.copytree(tmp_path / "1", folder)
        body = json.dumps({**summary, "step": step, "sequence": step}).encode() + b"\n" + lines[2]
        seal = json.dumps({"ckpttools": 1, "digest": digest.hash_bytes("xxh3", body)}).encode()
        (folder / layout.MANIFEST).write_bytes(seal + b"\n" + body)
    parsed = []
    monkeypatch.setattr(
        json, "loads", lambda text, real=json.loads, **how: parsed.append(len(text)) or real(text, **how)
    )
    with ct.open(spec_for(tmp_path)) as ckpt:
        assert ckpt.latest_step() == 1000
    assert 1000 <= len(parsed) <= 4010  # seal and summary of each step, at the opening and at the question
    assert max(parsed) < len(lines[2])  # the leaves are in the third line


@pytest.mark.filterwarnings("ignore:.*damaged step.*were passed over")
@pytest.mark.parametrize("how", ["manifest", "data"])
def test_damage_to_a_branchs_only_step_keeps_the_rollback(run, how):
    with ct.open(spec_for(run)) as ckpt:
        ckpt.restore(state(), step=60)
        ckpt.save(65, state(-65))
    folder = run / "65"
    damaged = folder / layout.MANIFEST if how == "manifest" else next((folder / "model").rglob("d/*"))
    damaged.write_bytes(damaged.read_bytes()[:-1])
    for _ in range(2):  # the second time, what is damaged is in quarantine
        with ct.open(spec_for(run)) as ckpt:
            assert ckpt.restore(state()).step == 60
    with ct.open(spec_for(run)) as ckpt:
        ckpt.restore(state())
        ckpt.save(65, state(-66))
        ckpt.wait()
        assert ckpt.all_steps() == (60, 65)


def test_a_commit_keeps_the_second_copies_of_a_damaged_step(run):
    (run / "100" / layout.MANIFEST).unlink()
    with ct.open(spec_for(run)) as ckpt:
        ckpt.restore(state())
        ckpt.save(90, state(90))
    assert [row.step for row in ct.ls(run)] == [60, 70, 80, 90]
    ct.repair(run)
    assert [row.step for row in ct.ls(run)] == [60, 70, 80, 100, 90]
    assert ct.verify(run).ok


def test_a_damaged_step_in_a_commits_place_is_quarantined(run):
    with ct.open(spec_for(run)) as ckpt:
        ckpt.restore(state(), step=60)
        (run / "70" / layout.MANIFEST).write_bytes(b"{}")
        ckpt.save(70, state(-70))
        ckpt.save(80, state(-80))
    assert (layout.get_control_path(run, "quarantine") / "70").is_dir()
    assert [path.name for path in layout.get_control_path(run, "superseded").iterdir()] == ["80"]


def test_a_kill_between_a_commits_two_moves_supersedes_nothing(run):
    with ct.open(spec_for(run)) as ckpt:
        ckpt.restore(state(), step=60)
        ckpt.save(100, state(-100))
    shutil.rmtree(run / "100")
    shutil.rmtree(layout.get_spare_directory(run, 5))
    with ct.open(spec_for(run)) as ckpt:
        assert ckpt.latest_step() == 100
        assert float(ckpt.restore(state()).state["model"]["w"][0]) == 100
