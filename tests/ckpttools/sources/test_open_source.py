# SPDX-License-Identifier: Apache-2.0
"""Every command that reads takes a run, a step's directory or a mirror, and names anything else."""

import dataclasses
import pathlib
import shutil

import numpy as np
import pytest

import ckpttools as ct
from ckpttools.cli import parser
from tests.ckpttools.cli.test_dispatch import call
from tests.ckpttools.restore.test_first_intact import flip_bit, largest_file, spec_for
from tests.ckpttools.store.writers import EMPTY, RUNS, STATE, write


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """The same two steps as a run, a copied step and a mirror."""
    root = tmp_path_factory.mktemp("places")
    with ct.open(dataclasses.replace(spec_for(root / "run"), mirror=f"file://{root}/mirror")) as ckpt:
        for step in (10, 20):
            ckpt.save(step, {"model": {"w": np.arange(2000.0) + step}})
    shutil.copytree(root / "run" / "20", root / "final")
    return root


LOCATIONS = {
    "run": lambda root: root / "run",
    "step": lambda root: root / "run" / "20",
    "copied step": lambda root: root / "final",
    "mirror": lambda root: f"file://{root}/mirror",
    "mirror's directory": lambda root: root / "mirror",
    "Mirror": lambda root: ct.Mirror(f"file://{root}/mirror"),
}


@pytest.mark.parametrize("name", LOCATIONS)
def test_every_reader_takes_every_location(places, tmp_path, name):
    location = LOCATIONS[name](places)
    steps = [20] if "step" in name else [10, 20]
    assert [row.step for row in ct.ls(location)] == steps
    assert {row.state for row in ct.ls(location)} == {"committed"}
    report = ct.verify(location)
    assert (report.ok, [step.step for step in report.steps]) == (True, steps)
    assert [leaf.name for leaf in ct.show(location).leaves] == ["model.w"]
    loaded = ct.load(location, {"model": {"w": np.zeros(2000)}})
    assert (loaded.step, loaded.state["model"]["w"][0]) == (20, 20.0)
    assert ct.diff(places / "run" / "10", location).changed[0].max_abs == 10.0
    assert ct.diff(location, location).same
    assert ct.export_safetensors(location, tmp_path / "w.safetensors") == ("w",)


def damage_run(root):
    flip_bit(largest_file(root / "run" / "20"))


def damage_copy(root):
    flip_bit(largest_file(root / "final"))


def damage_mirror(root):
    flip_bit(largest_file(next((root / "mirror").glob("20-*"))))


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("run", damage_run),
        ("step", damage_run),
        ("copied step", damage_copy),
        ("mirror", damage_mirror),
        ("Mirror", damage_mirror),
    ],
)
def test_damage_is_found_at_every_location(places, tmp_path, name, damage):
    root = tmp_path / "damaged"
    shutil.copytree(places, root)
    damage(root)
    location = LOCATIONS[name](root)
    report = ct.verify(location)
    assert not report.ok
    assert report.steps[-1].state == "corrupt"
    with pytest.raises(ct.CorruptStepError):
        ct.load(location, {"model": {"w": np.zeros(2000)}}, step=20)


def test_a_copy_without_an_intact_manifest_is_not_ok(places, tmp_path):
    shutil.copytree(places / "mirror", tmp_path / "mirror")
    flip_bit(next((tmp_path / "mirror").glob("20-*")) / "ckpttools.manifest")
    report = ct.verify(f"file://{tmp_path}/mirror")
    assert [(step.step, step.state) for step in report.steps] == [(10, "intact"), (20, "incomplete")]
    assert not report.ok


@pytest.mark.parametrize("place", ["run/20/model", "file", "nothing", "empty", "logs"])
def test_every_command_names_what_is_not_a_run(places, tmp_path, capsys, place):
    shutil.copytree(places / "run", tmp_path / "run")
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "a.txt").write_text("x")
    path, weights = tmp_path / place, tmp_path / "w.safetensors"
    for argv in (["verify", path], ["ls", path], ["show", path], ["diff", path, path], ["export", path, weights]):
        code, out, err = call(capsys, *argv)
        assert code != parser.EXIT_OK, argv
        assert str(path) in out + err, argv
        assert any(word in out + err for word in ("item 'model'", "file", "nothing", "empty", "a.txt")), argv
    with pytest.raises(ct.StepNotFoundError):
        ct.load(path, {"model": {"w": np.zeros(2000)}})
    assert not weights.exists()


@pytest.mark.parametrize(("place", "code"), [("run", 0), ("run/20", 0), ("final", 0)])
def test_the_command_succeeds_where_something_was_read(places, capsys, place, code):
    """Control."""
    for command in ("verify", "ls", "show"):
        assert call(capsys, command, places / place)[0] == code


def test_the_commands_take_the_address_of_a_mirror(places, capsys):
    url = f"file://{places}/mirror"
    assert "20: intact" in call(capsys, "verify", url)[1]
    assert call(capsys, "ls", url)[0] == call(capsys, "show", url)[0] == parser.EXIT_OK
    assert call(capsys, "diff", url, 10)[0] == parser.EXIT_NO
    assert call(capsys, "diff", places / "run" / "10", 20)[0] == parser.EXIT_NO


def test_a_missing_step_is_named_with_those_there_are(places):
    for read in (ct.show, ct.verify, ct.ls):
        with pytest.raises(ct.StepNotFoundError, match="available: 10, 20"):
            read(places / "run" / "30")


@pytest.mark.parametrize("name", RUNS)
def test_a_foreign_run_is_listed_and_loaded_and_left_alone(tmp_path, name):
    run = write(RUNS[name], tmp_path / "run2")
    before = sorted(map(str, run.rglob("*")))
    rows = ct.ls(run)
    assert [(row.step, row.state) for row in rows] == [(10, "unverified"), (20, "unverified")]
    assert all("foreign: " in row.reason for row in rows)
    assert "foreign: " in ct.show(run).reason
    assert {leaf.shape for leaf in ct.show(run).leaves} >= {(2, 3), (3,)}
    assert not ct.verify(run).ok
    loaded = ct.load(run, {"default": EMPTY})
    assert loaded.step == 20
    np.testing.assert_array_equal(loaded.state["default"]["w"], STATE["w"])
    one = next(path for path in run.iterdir() if path.name.endswith("10"))
    assert ct.load(one, {"default": EMPTY}).step == 10
    assert sorted(map(str, run.rglob("*"))) == before


def test_a_path_that_lost_the_slashes_of_an_address_is_not_a_run(places):
    with pytest.raises(ct.NotARunError, match="does not exist"):
        ct.ls(pathlib.Path(f"file://{places}/mirror"))
