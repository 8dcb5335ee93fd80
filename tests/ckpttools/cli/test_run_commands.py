# SPDX-License-Identifier: Apache-2.0
"""`ls`, `show`, `verify`, `prune`, `pin` and `repair`, as a new user would try them."""

import pytest

import ckpttools as ct
from ckpttools.cli import parser
from ckpttools.store import layout
from tests.ckpttools.cli.commands import as_json, call, damage, spec_for, state_at


def test_ls_shows_steps_metrics_sizes_and_branches(run, capsys):
    code, out, _ = call(capsys, "ls", run)
    assert code == parser.EXIT_OK
    lines = out.splitlines()
    assert lines[0].split() == ["step", "state", "saved", "size", "val_loss", "branch", "reason"]
    assert [line.split()[0] for line in lines[1:]] == ["10", "20", "30"]
    assert "committed" in lines[1]
    assert "KiB" in lines[1]
    assert "0.1" in lines[1]
    code, rows = as_json(capsys, "ls", run)
    assert [row["step"] for row in rows] == [10, 20, 30]
    assert rows[2]["metrics"] == {"val_loss": "nan"}, "JSON has no NaN"


def test_ls_can_verify(run, capsys):
    assert as_json(capsys, "ls", run, "--verify")[0] == parser.EXIT_OK
    damage(run, 20)
    code, rows = as_json(capsys, "ls", run, "--verify")
    assert code == parser.EXIT_NO
    assert [row["state"] for row in rows] == ["committed, intact", "committed, corrupt", "committed, intact"]
    assert [row["state"] for row in as_json(capsys, "ls", run)[1]] == ["committed"] * 3, "without it no byte is read"


def test_ls_verifies_each_of_two_steps_with_one_number(run, capsys):
    with ct.open(spec_for(run)) as ckpt:
        ckpt.restore(state_at(1), step=10)
        ckpt.save(20, state_at(21))
    damage(run, 20)
    states = {row["state"] for row in as_json(capsys, "ls", run, "--verify")[1] if row["step"] == 20}
    assert states == {"committed, corrupt", "superseded, intact"}
    (superseded,) = [row for row in ct.ls(run) if (row.step, row.state) == (20, "superseded")]
    assert f"step 20 (superseded, branch {superseded.branch}): intact" in call(capsys, "verify", run)[1]


def test_show_lists_every_leaf(run, capsys):
    code, out, _ = call(capsys, "show", run)
    assert code == parser.EXIT_OK
    assert out.startswith("step 30: committed; asked for; val_loss=nan")
    assert "model.large  float32[4096]  16.0 KiB" in out
    assert "model.half   bfloat16[2,3]      12 B" in out
    assert "data.epoch   30" in out
    code, shown = as_json(capsys, "show", run / "10")
    assert shown["step"] == 10
    assert shown["lineage"] == [[ct.ls(run)[0].branch, 0]]
    assert f"lineage: branch {ct.ls(run)[0].branch}\n" in out
    assert {leaf["name"]: leaf["bytes"] for leaf in shown["leaves"]}["model.large"] == 4096 * 4
    assert str(ct.show(run, 10)).startswith("step 10: committed, 3 leaves")


def test_show_of_a_step_that_is_not_there_or_damaged(run, capsys):
    code, out, err = call(capsys, "show", run / "99")
    assert (code, out) == (parser.EXIT_FAILED, "")
    assert "has no step 99" in err
    assert "available: 10, 20, 30" in err
    (run / "20" / layout.MANIFEST).write_text("{}")
    code, _, err = call(capsys, "show", run / "20")
    assert code == parser.EXIT_FAILED
    assert "damaged" in err
    assert call(capsys, "show", run)[1].startswith("step 30"), "the newest that can be read"


def test_verify_names_the_damage(run, capsys):
    assert call(capsys, "verify", run)[:2] == (parser.EXIT_OK, "step 10: intact\nstep 20: intact\nstep 30: intact\n")
    damage(run, 20)
    code, out, _ = call(capsys, "verify", run)
    assert code == parser.EXIT_NO
    assert "step 20: corrupt, 1 leaf differs from what was saved.\n" in out
    assert "damaged leaf: model.large" in out
    assert call(capsys, "verify", run / "10")[0] == parser.EXIT_OK
    assert as_json(capsys, "verify", run)[1]["ok"] is False
    code, _, err = call(capsys, "verify", run / "99")
    assert code == parser.EXIT_FAILED
    assert "has no step 99" in err


def test_prune_says_what_it_would_delete_then_does(run, capsys, tmp_path):
    code, out, _ = call(capsys, "prune", run, "--latest", 2, "--dry-run")
    assert code == parser.EXIT_OK
    assert "10  would be deleted" in out
    assert (run / "10").exists()
    assert as_json(capsys, "prune", run, "--best", "val_loss:max", "--dry-run")[1]["steps"][0]["keep"] is True
    (tmp_path / "train.toml").write_text('[checkpoint]\ndirectory = "run"\nkeep = [{ every_n_steps = 10 }]\n')
    assert "deleted" not in call(capsys, "prune", run, "--spec", tmp_path / "train.toml")[1]
    assert "10  deleted" in call(capsys, "prune", run, "--latest", 2)[1]
    assert not (run / "10").exists()


def test_prune_without_a_retention_or_with_a_wrong_one(run, capsys):
    code, _, err = call(capsys, "prune", run)
    assert code == parser.EXIT_FAILED
    assert "no option names the steps to keep" in err
    code, _, err = call(capsys, "prune", run, "--best", "val_loss")
    assert code == parser.EXIT_FAILED
    assert "has no direction" in err


@pytest.mark.filterwarnings("ignore:.*damaged step.*were passed over")
def test_prune_empties_quarantine_when_asked(run, capsys):
    quarantine = layout.get_control_path(run, "quarantine")
    assert call(capsys, "prune", run, "--quarantine")[:2] == (parser.EXIT_OK, "nothing to delete in quarantine\n")
    damage(run, 30)
    with ct.open(spec_for(run)) as ckpt:
        assert ckpt.restore(state_at(0)).step == 20
    code, out, _ = call(capsys, "prune", run, "--quarantine")
    assert (code, out) == (parser.EXIT_OK, "nothing to delete in quarantine\n"), "the run's branch hangs on it"
    assert (quarantine / "30").is_dir()
    with ct.open(spec_for(run)) as ckpt:
        ckpt.restore(state_at(0))
        ckpt.save(40, state_at(40))
    plan = as_json(capsys, "prune", run, "--quarantine", "--latest", 2, "--dry-run")[1]
    assert plan["quarantine"] == ["30"]
    assert [(step["step"], step["keep"]) for step in plan["steps"]] == [(10, False), (20, True), (40, True)]
    assert call(capsys, "prune", run, "--quarantine", "--dry-run")[1] == "quarantined 30 would be deleted\n"
    assert call(capsys, "prune", run, "--latest", 3)[0] == parser.EXIT_OK
    assert (quarantine / "30").is_dir(), "the control: without the flag it stays"
    code = call(capsys, "prune", run, "--quarantine", "--best", "val_loss")[0]
    assert (code, (quarantine / "30").is_dir()) == (parser.EXIT_FAILED, True), "nothing is done by halves"
    code, out, _ = call(capsys, "prune", run, "--quarantine", "--latest", 2)
    assert "10  deleted" in out
    assert out.endswith("quarantined 30 deleted\n")
    assert not list(quarantine.iterdir())
    assert as_json(capsys, "prune", run, "--latest", 2)[1]["quarantine"] == []


def test_pin_protects_and_unpin_gives_back(run, capsys):
    assert call(capsys, "pin", run, 10)[:2] == (parser.EXIT_OK, "pinned 10\n")
    assert "pinned" in call(capsys, "ls", run)[1]
    assert "would be deleted" not in call(capsys, "prune", run, "--latest", 2, "--dry-run")[1]
    assert call(capsys, "unpin", run, 10)[:2] == (parser.EXIT_OK, "unpinned 10\n")
    assert "would be deleted" in call(capsys, "prune", run, "--latest", 2, "--dry-run")[1]
    code, _, err = call(capsys, "pin", run, 99)
    assert code == parser.EXIT_FAILED
    assert "step 99 cannot be pinned" in err


def test_repair_puts_back_what_has_a_second_copy(run, capsys):
    assert call(capsys, "repair", run)[:2] == (parser.EXIT_OK, "nothing to repair\n")
    (run / "30" / layout.MANIFEST).write_text("{}")
    assert "dry run" in call(capsys, "repair", run, "--dry-run")[1]
    assert as_json(capsys, "repair", run)[1]["repairs"][0]["possible"] is True
    assert call(capsys, "verify", run)[0] == parser.EXIT_OK
    for path in (run / ".ckpttools" / "spare" / "3").rglob("*"):
        path.unlink() if path.is_file() and path.name != layout.MANIFEST else None
    damage(run, 30)
    assert call(capsys, "repair", run)[0] == parser.EXIT_NO


def test_record_refuses_two_values_and_empty_names(run, capsys):
    for pairs, expected in ((["a=1", "a=2"], "'a' was given twice"), (["=5"], "a metric is named ''")):
        code, _, err = call(capsys, "record", run, 10, *pairs)
        assert (code, expected in err) == (parser.EXIT_FAILED, True)
    assert "a" not in ct.show(run, 10).metrics
    assert call(capsys, "record", run, 10, "a=1", "b=2")[0] == parser.EXIT_OK, "control"


def test_pinning_is_all_or_nothing(run, capsys):
    code, _, err = call(capsys, "pin", run, 10, 77)
    assert (code, "step 77 cannot be pinned" in err) == (parser.EXIT_FAILED, True)
    assert "none of the steps was pinned" in err
    assert "pinned" not in call(capsys, "ls", run)[1]
    assert call(capsys, "pin", run, 10, 20)[1] == "pinned 10, 20\n"
