# SPDX-License-Identifier: Apache-2.0
"""`diff`, `adopt`, `export`, `import` and `mirror`, as a new user would try them."""

import json

import jax.numpy as jnp
import pytest
from orbax.checkpoint import v1

import ckpttools as ct
from ckpttools.cli import parser
from ckpttools.store import layout
from tests.ckpttools.cli.commands import as_json, call, damage, spec_for, state_at


def test_diff_names_what_changed_and_exits_with_1(run, capsys):
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


def test_mirror_lists_the_steps_of_plain_orbax_it_skips(tmp_path, capsys):
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


def test_a_mirror_inside_its_run_is_refused(run, capsys):
    before = sorted(run.iterdir())
    for url in (run, run / "copies", f"file://{run}/copies"):
        code, _, err = call(capsys, "mirror", run, url)
        assert code == parser.EXIT_FAILED
        assert "lies inside the directory of its run" in err
    with pytest.raises(ct.SpecError, match="lies inside the directory"):
        ct.open(ct.CheckpointSpec(directory=run, mirror=f"{run}/copies"))
    assert sorted(run.iterdir()) == before


def test_plain_orbax_is_not_damage_and_adopt_reports_what_fails(foreign, tmp_path, capsys):
    assert call(capsys, "repair", foreign, "--dry-run")[:2] == (parser.EXIT_OK, "nothing to repair\n")
    (tmp_path / "3").mkdir()
    (tmp_path / "3" / "_CHECKPOINT_METADATA").write_text("[")
    code, out, err = call(capsys, "adopt", tmp_path, "--dry-run")
    assert (code, out) == (parser.EXIT_FAILED, "")
    assert "step 3 cannot be adopted" in err


def test_words_in_place_of_numbers_are_refused(run, tmp_path, capsys):
    code, _, err = call(capsys, "mirror", run, tmp_path / "m", "--fetch", "newest")
    assert code == parser.EXIT_FAILED
    assert "--fetch newest: not a step" in err
    code, _, err = call(capsys, "prune", run, "--best", "loss:min:two")
    assert code == parser.EXIT_FAILED
    assert "'two' is not a number of steps" in err


def test_adopting_a_step_of_a_run_into_another_is_an_error(run, tmp_path, capsys):
    code, _, err = call(capsys, "adopt", run / "10", "--into", tmp_path / "new")
    assert (code, "step 10 has a manifest already" in err) == (parser.EXIT_FAILED, True)
    assert not (tmp_path / "new").exists()
    assert call(capsys, "adopt", run)[:2] == (parser.EXIT_OK, "adopted nothing\n"), "control"


@pytest.mark.parametrize("place", ["10/x.safetensors", "10/model/x.safetensors", "7", ".ckpttools/x.safetensors"])
def test_nothing_is_exported_into_a_step(run, capsys, place):
    code, _, err = call(capsys, "export", run, run / place)
    assert (code, "step" in err) == (parser.EXIT_FAILED, True)
    assert not (run / place).exists()
    assert call(capsys, "export", run, run / "x.safetensors")[0] == parser.EXIT_OK, "control"
