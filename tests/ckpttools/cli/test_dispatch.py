# SPDX-License-Identifier: Apache-2.0
"""Each command as a new user would try it: on a healthy, a damaged, an empty, a foreign and a live run."""

import json
import pathlib
import runpy
import subprocess
import sys
import warnings

import jax.numpy as jnp
import pytest
from orbax.checkpoint import v1

import ckpttools as ct
from ckpttools.cli import main, output, parser, run_commands
from ckpttools.store import layout


def state_at(step):
    return {
        "model": {"large": jnp.arange(4096.0) + step, "half": jnp.ones((2, 3), jnp.bfloat16)},
        "data": {"epoch": step},
    }


def spec_for(folder):
    return ct.CheckpointSpec(directory=folder, keep=ct.All())


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "run"
    with ct.open(spec_for(folder)) as ckpt:
        for step in (10, 20, 30):
            ckpt.save(step, state_at(step), metrics={"val_loss": 1 / step if step < 30 else float("nan")})
    return folder


@pytest.fixture
def foreign(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        v1.save_checkpointables(
            tmp_path / "plain" / "3", {"model": {"a": jnp.ones((2, 3), jnp.bfloat16)}, "x": {"e": 4}}
        )
    return tmp_path / "plain"


def damage(run, step):
    path = max((p for p in (run / str(step)).rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def call(capsys, *argv):
    code = main.main([str(each) for each in argv])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def as_json(capsys, *argv):
    code, out, _ = call(capsys, *argv, "--json")
    return code, json.loads(out)


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


def test_a_table_is_not_folded_where_there_is_no_terminal(run, capsys, monkeypatch):
    """A file or a pipe has no width; rich takes it for 80 columns wide."""
    monkeypatch.setenv("COLUMNS", "60")
    with ct.open(spec_for(run)) as ckpt:
        ckpt.restore(state_at(1), step=20)
        ckpt.save(40, state_at(40), metrics={"val_loss": 1.0})
    assert len(call(capsys, "ls", run, "--verify")[1].splitlines()) == 5


def test_ls_can_verify(run, capsys):
    assert as_json(capsys, "ls", run, "--verify")[0] == parser.EXIT_OK
    damage(run, 20)
    code, rows = as_json(capsys, "ls", run, "--verify")
    assert code == parser.EXIT_NO
    assert [row["state"] for row in rows] == ["committed, intact", "committed, corrupt", "committed, intact"]
    assert [row["state"] for row in as_json(capsys, "ls", run)[1]] == ["committed"] * 3, "without it no byte is read"


def test_show_lists_every_leaf(run, capsys):
    code, out, _ = call(capsys, "show", run)
    assert code == parser.EXIT_OK
    assert out.startswith("step 30: committed; asked for; val_loss=nan")
    assert "model.large  float32[4096]  16.0 KiB" in out
    assert "model.half   bfloat16[2,3]      12 B" in out
    assert "data.epoch   30" in out
    code, shown = as_json(capsys, "show", run / "10")
    assert shown["step"] == 10
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


def test_verify_tells_how_far_it_is(run):
    seen = []
    ct.verify(run, progress=lambda done, total: seen.append((done, total)))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1][0] == seen[-1][1] == sum(row.total_bytes for row in ct.ls(run))


def test_diff_export_and_import_tell_how_far_they_are(run, tmp_path):
    """The last call is at the end; a file has a header besides."""
    seen = []

    def told(done, total):
        seen.append((done, total))

    ct.diff(run / "10", run / "20", progress=told)
    assert 0 < seen[-1][0] == seen[-1][1]
    seen.clear()
    ct.export_safetensors(run, tmp_path / "out.safetensors", progress=told)
    assert 0 < seen[-1][0] == seen[-1][1]
    seen.clear()
    ct.import_run(tmp_path / "out.safetensors", tmp_path / "new", progress=told)
    assert 0 < seen[-1][0] < seen[-1][1]
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_diff_names_what_changed_and_says_so_by_its_exit_code(run, capsys):
    code, out, _ = call(capsys, "diff", run / "10", "20")
    assert code == parser.EXIT_NO
    assert "model.large" in out
    assert "model.half" not in out
    code, found = as_json(capsys, "diff", run / "10", run / "20")
    assert (code, found["same"]) == (parser.EXIT_NO, False)
    assert {leaf["name"]: leaf["max_abs"] for leaf in found["changed"]}["model.large"] == 10.0
    assert as_json(capsys, "diff", run / "20", run / "20") == (parser.EXIT_OK, {**found, **same_of(run / "20")})
    code, _, err = call(capsys, "diff", run / "10", "77")
    assert code == parser.EXIT_FAILED
    assert "77" in err


def same_of(step):
    report = ct.diff(step, step)
    assert report.same
    return json.loads(json.dumps(report.as_dict()))


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


def test_an_empty_and_a_missing_folder(tmp_path, capsys):
    (tmp_path / "run").mkdir()
    code, out, err = call(capsys, "ls", tmp_path / "run")
    assert (code, out) == (parser.EXIT_NO, "no steps\n")
    assert "is an empty directory" in err
    code, out, _ = call(capsys, "verify", tmp_path / "run")
    assert (code, out) == (parser.EXIT_NO, f"no steps: {tmp_path / 'run'} is an empty directory.\n")
    assert call(capsys, "prune", tmp_path / "run", "--latest", 2, "--dry-run")[:2] == (
        parser.EXIT_OK,
        "no steps\n",
    )
    code, _, err = call(capsys, "show", tmp_path / "run")
    assert code == parser.EXIT_FAILED
    assert "no step that can be read" in err
    assert not list((tmp_path / "run").iterdir()), "a look leaves nothing behind"
    for command in ("ls", "show", "verify", "repair"):
        code, _, err = call(capsys, command, tmp_path / "nothing")
        assert code == parser.EXIT_FAILED
        assert "is not a directory" in err


def test_a_run_of_plain_orbax(foreign, capsys):
    assert "unverified" in call(capsys, "ls", foreign)[1]
    code, out, _ = call(capsys, "show", foreign)
    assert code == parser.EXIT_OK
    assert "model.a  bfloat16[2,3]   12 B" in out
    assert "(not read)" in out
    assert call(capsys, "verify", foreign)[:1] == (parser.EXIT_NO,)
    assert call(capsys, "adopt", foreign, "--dry-run")[1] == "would adopt 3\n"
    assert call(capsys, "adopt", foreign)[1] == "adopted 3\n"
    assert "committed" in call(capsys, "ls", foreign)[1]
    assert "x.e      4 " in call(capsys, "show", foreign)[1]


def test_metadata_of_plain_orbax_that_cannot_be_read(tmp_path, capsys):
    (tmp_path / "3").mkdir()
    (tmp_path / "3" / "_CHECKPOINT_METADATA").write_text("[")
    code, _, err = call(capsys, "show", tmp_path)
    assert code == parser.EXIT_FAILED
    assert "the metadata of step 3 cannot be read" in err


def test_a_live_run_can_be_looked_at_and_not_changed(run, capsys):
    with ct.open(spec_for(run)) as ckpt:
        ckpt.restore(state_at(0))
        ckpt.steps(99)
        for argv in (["ls"], ["show"], ["verify"], ["prune", "--latest", "1", "--dry-run"], ["repair", "--dry-run"]):
            assert call(capsys, argv[0], run, *argv[1:])[0] == parser.EXIT_OK, argv
        for argv in (["prune", "--latest", "1"], ["repair"]):
            code, _, err = call(capsys, argv[0], run, *argv[1:])
            assert code == parser.EXIT_FAILED
            assert "is being written by process" in err
        assert call(capsys, "pin", run, 10)[0] == parser.EXIT_OK
        ckpt.save(40, state_at(40))
    assert "pinned" in call(capsys, "ls", run)[1]


def test_a_step_that_vanishes_under_a_look_is_not_called_damaged(run, monkeypatch):
    from ckpttools.store import commit, file_integrity

    original = file_integrity.find_damaged_files

    def and_then_gone(entry, *args):
        if entry.step == 10 and entry.path.exists():
            commit.discard(run, entry.path)
        return original(entry, *args)

    monkeypatch.setattr(file_integrity, "find_damaged_files", and_then_gone)
    report = ct.verify(run)
    assert [step.step for step in report.steps] == [20, 30]
    assert report.ok


def test_control_codes_of_a_hostile_run_do_not_reach_the_terminal(capsys):
    output.print_table(["a"], [["\x1b[2J[bold]x[/bold]"]])
    output.print_text("\x1b[31mred")
    output.print_error("\x07bell")
    captured = capsys.readouterr()
    assert captured.out == "a\n?[2J[bold]x[/bold]\n?[31mred\n".replace("a\n", captured.out.splitlines()[0] + "\n")
    assert captured.err == "ckpttools: ?bell\n"


def test_the_installed_command_and_a_reader_who_leaves_early(run):
    command = f"{pathlib.Path(sys.executable).parent / 'ckpttools'} show {run} | head -1; exit ${{PIPESTATUS[0]}}"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert result.stdout.startswith("step 30: committed")
    assert result.returncode == parser.EXIT_OK
    assert result.stderr == ""


def test_the_module_is_the_command(run, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["ckpttools", "verify", str(run)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("ckpttools", run_name="__main__")
    assert ended.value.code == parser.EXIT_OK
    with pytest.raises(SystemExit) as ended:
        main.main(["nonsense"])
    assert ended.value.code == parser.EXIT_FAILED
    assert "invalid choice" in capsys.readouterr().err


def test_an_interrupt_and_a_disk_that_does_not_answer_have_exit_codes(run, capsys, monkeypatch):
    def refuse(*args, **options):
        raise PermissionError(13, "Permission denied", "the disk")

    def interrupt(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(run_commands, "ls", refuse)
    assert call(capsys, "ls", run)[::2] == (
        parser.EXIT_FAILED,
        "ckpttools: the disk cannot be read or written: Permission denied.\n",
    )
    monkeypatch.setattr(run_commands, "ls", interrupt)
    assert call(capsys, "ls", run)[0] == parser.EXIT_INTERRUPTED


@pytest.mark.parametrize(("count", "text"), [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (3 << 40, "3.0 TiB")])
def test_sizes_read_well(count, text):
    assert output.format_bytes(count) == text


def test_weights_go_out_and_come_in(run, tmp_path, capsys):
    file = tmp_path / "m.safetensors"
    code, out, _ = call(capsys, "export", run / "20", file, "--name", "large=wte", "--meta", "who=me")
    assert (code, out) == (parser.EXIT_OK, f"2 tensors in {file}\n")
    code, out, _ = call(capsys, "import", tmp_path / "new", file, "--name", "large=wte", "--step", 5)
    assert (code, out) == (parser.EXIT_OK, f"2 leaves in step 5 of {tmp_path / 'new'}\n")
    with ct.open(spec_for(tmp_path / "new")) as ckpt:
        model = ckpt.restore({"model": {"large": jnp.zeros(4096), "half": jnp.zeros((2, 3), jnp.bfloat16)}}).state
    assert model["model"]["large"].tolist() == state_at(20)["model"]["large"].tolist()
    assert as_json(capsys, "export", run, file, "--item", "data")[1]["tensors"] == []
    code, _, err = call(capsys, "import", run, file)
    assert code == parser.EXIT_FAILED
    assert "holds steps" in err
    code, _, err = call(capsys, "export", run, file, "--name", "large")
    assert code == parser.EXIT_FAILED
    assert "has no '='" in err
    code, _, err = call(capsys, "import", tmp_path / "other", run / "30" / layout.MANIFEST)
    assert code == parser.EXIT_FAILED
    assert "not a whole safetensors file" in err


def test_the_mirror_of_a_foreign_run_says_what_it_leaves_out(tmp_path, capsys):
    with v1.Context():
        v1.save_checkpointables(tmp_path / "run" / "5", {"m": {"w": jnp.ones(2)}})
    url = f"file://{tmp_path}/copy"
    code, out, _ = call(capsys, "mirror", tmp_path / "run", url)
    assert code == parser.EXIT_OK
    assert "not copied, because plain Orbax wrote them without digests: 5; adopt them first" in out
    assert as_json(capsys, "mirror", tmp_path / "run", url)[1]["unverified"] == [5]
    call(capsys, "adopt", tmp_path / "run")
    out = call(capsys, "mirror", tmp_path / "run", url)[1]
    assert "copied" in out
    assert "not copied" not in out


def test_a_mirror_by_hand(run, tmp_path, capsys):
    url = f"file://{tmp_path / 'nas'}"
    code, out, _ = call(capsys, "mirror", run, url, "--dry-run")
    assert code == parser.EXIT_OK
    assert "would be copied" in out
    assert not (tmp_path / "nas").exists()
    assert call(capsys, "mirror", run, url, "--option", "auto_mkdir=true")[1].count("copied") == 3
    code, report = as_json(capsys, "mirror", run, url, "--check")
    assert code == parser.EXIT_OK
    assert [(step["here"], step["there"], step["done"]) for step in report["steps"]] == [(True, "complete", "")] * 3
    (copy,) = (tmp_path / "nas").glob("20-*")
    damage(tmp_path / "nas", copy.name)
    code, out, _ = call(capsys, "mirror", run, url, "--check", "--dry-run")
    assert code == parser.EXIT_NO
    assert "would be repaired" in out
    assert "repaired" in call(capsys, "mirror", run, url, "--check")[1]
    damage(run, 30)
    assert call(capsys, "mirror", run, url, "--fetch", "30")[:2] == (parser.EXIT_OK, "fetched step 30\n")
    assert call(capsys, "verify", run)[0] == parser.EXIT_OK
    (tmp_path / "empty").mkdir()
    assert call(capsys, "mirror", tmp_path / "empty", url, "--fetch")[1] == "fetched step 30\n"
    damage(tmp_path / "nas", copy.name)
    code, out, _ = call(capsys, "mirror", tmp_path / "empty", url, "--check")
    assert code == parser.EXIT_NO
    assert "no local copy to repair it from" in out


def test_a_mirror_takes_its_address_and_retention_from_a_spec(run, tmp_path, capsys):
    spec = ct.CheckpointSpec(directory=run, mirror=ct.Mirror(f"file://{tmp_path / 'nas'}", keep=ct.Latest(2)))
    (tmp_path / "train.toml").write_text(spec.to_toml())
    assert call(capsys, "mirror", run, "--spec", tmp_path / "train.toml")[0] == parser.EXIT_OK
    assert sorted(path.name.partition("-")[0] for path in (tmp_path / "nas").iterdir()) == ["20", "30"]
    call(capsys, "mirror", run, spec.mirror.url)
    out = call(capsys, "mirror", run, "--spec", tmp_path / "train.toml")[1]
    assert "deleted" in out
    code, _, err = call(capsys, "mirror", run)
    assert code == parser.EXIT_FAILED
    assert "neither the arguments nor a spec name a mirror" in err


def test_a_mirror_by_hand_that_cannot_be(run, tmp_path, capsys):
    url = f"file://{tmp_path / 'nas'}"
    damage(run, 20)
    code, out, _ = call(capsys, "mirror", run, url)
    assert code == parser.EXIT_NO
    assert "not copied: " in out
    code, _, err = call(capsys, "mirror", run, url, "--fetch", "99")
    assert code == parser.EXIT_FAILED
    assert "has no step 99" in err
    assert call(capsys, "mirror", run, "nonsense://x")[0] == parser.EXIT_FAILED
    with ct.open(spec_for(run)) as ckpt:
        ckpt.restore(state_at(0))
        ckpt.steps(99)
        assert call(capsys, "mirror", run, url, "--dry-run")[0] == parser.EXIT_OK
        code, _, err = call(capsys, "mirror", run, url)
        assert code == parser.EXIT_FAILED
        assert "is being written by process" in err
    (tmp_path / "other").mkdir()
    with ct.open(spec_for(tmp_path / "other")) as ckpt:
        ckpt.save(1, state_at(1))
    assert "another run's" in str(ct.sync_mirror(tmp_path / "other", url))


def test_an_import_of_names_that_clash(tmp_path, capsys):
    ct.export_safetensors({"a.b": jnp.ones(1), "a": jnp.ones(2)}, tmp_path / "m")
    code, _, err = call(capsys, "import", tmp_path / "run", tmp_path / "m")
    assert code == parser.EXIT_FAILED
    assert "others below that name" in err


def test_an_import_with_keys_and_values(tmp_path):
    import jax

    state = {"key": jax.random.key(3), "count": 7, "w": jnp.ones(2)}
    ct.export_safetensors(state, tmp_path / "m")
    assert ct.import_run(tmp_path / "m", tmp_path / "run") == 3
    with ct.open(spec_for(tmp_path / "run")) as ckpt:
        blank = {"key": jax.random.key(0), "count": 0, "w": jnp.zeros(2)}
        back = ckpt.restore({"model": blank}).state["model"]
    assert back["count"] == 7
    assert jax.random.key_data(back["key"]).tolist() == jax.random.key_data(state["key"]).tolist()
    (tmp_path / "m").write_bytes(b"\x2e" + b"\0" * 7 + b'{"__metadata__":{"ckpttools.value.count":"["}}')
    with pytest.raises(ct.TensorFileError, match="the metadata of the file holds an invalid value"):
        ct.import_run(tmp_path / "m", tmp_path / "bad")


@pytest.mark.parametrize(
    "argv",
    [
        ["prune", "--latest", "1"],
        ["prune", "--quarantine"],
        ["pin", "20"],
        ["repair"],
        ["adopt"],
        ["mirror", "m"],
    ],
    ids=lambda a: a[0],
)
def test_a_step_given_where_a_run_is_meant_is_not_called_empty(run, capsys, argv):
    code, out, err = call(capsys, argv[0], run / "20", *argv[1:])
    assert (code, out) == (parser.EXIT_FAILED, "")
    assert "is one step of a run" in err
    assert f"ckpttools ... {run}" in err


def test_damage_that_stops_a_command_is_named_with_the_way_out(run, tmp_path, capsys):
    damage(run, 30)
    code, _, err = call(capsys, "export", run, tmp_path / "x.safetensors")
    assert code == parser.EXIT_FAILED
    assert "damaged leaf: model." in err
    assert f"ckpttools verify {run}" in err
    assert not (tmp_path / "x.safetensors").exists()


def test_numbers_that_are_none_are_refused(run, tmp_path, capsys):
    code, _, err = call(capsys, "mirror", run, tmp_path / "m", "--fetch", "newest")
    assert code == parser.EXIT_FAILED
    assert "--fetch newest: not a step" in err
    code, _, err = call(capsys, "prune", run, "--best", "loss:min:two")
    assert code == parser.EXIT_FAILED
    assert "'two' is not a number of steps" in err


def test_a_mirror_inside_its_run_is_refused(run, capsys):
    before = sorted(run.iterdir())
    for url in (run, run / "copies", f"file://{run}/copies"):
        code, _, err = call(capsys, "mirror", run, url)
        assert code == parser.EXIT_FAILED
        assert "lies inside the directory of its run" in err
    with pytest.raises(ct.SpecError, match="lies inside the directory"):
        ct.open(ct.CheckpointSpec(directory=run, mirror=f"{run}/copies"))
    assert sorted(run.iterdir()) == before


def test_plain_orbax_is_no_damage_and_a_dry_run_of_adopt_is_honest(foreign, tmp_path, capsys):
    assert call(capsys, "repair", foreign, "--dry-run")[:2] == (parser.EXIT_OK, "nothing to repair\n")
    (tmp_path / "3").mkdir()
    (tmp_path / "3" / "_CHECKPOINT_METADATA").write_text("[")
    code, out, err = call(capsys, "adopt", tmp_path, "--dry-run")
    assert (code, out) == (parser.EXIT_FAILED, "")
    assert "step 3 cannot be adopted" in err


def test_an_import_into_a_run_is_refused_before_anything_is_read(run, tmp_path, capsys):
    code, _, err = call(capsys, "import", run, tmp_path / "none.safetensors")
    assert code == parser.EXIT_FAILED
    assert "holds steps" in err
    assert "import into a new directory" in err
