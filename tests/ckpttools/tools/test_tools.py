# SPDX-License-Identifier: Apache-2.0
"""verify, repair, adopt, prune: what can be done to a run from outside."""

import os
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as v0
import pytest
from flax import nnx
from orbax.checkpoint import v1

import ckpttools as ct
from ckpttools.store import catalogue, layout
from tests.ckpttools.restore.test_first_intact import STATE, flip_bit, largest_file, restore, spec_for


def snapshot_of(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_verify_finds_nothing_in_a_healthy_run_and_changes_nothing(run):
    before = snapshot_of(run)
    report = ct.verify(run)
    assert report.ok
    assert [step.state for step in report.steps] == ["intact"] * 3
    assert report.as_dict()["ok"] is True
    assert str(ct.verify(run, 20)) == "step 20: intact"
    assert snapshot_of(run) == before


def test_verify_names_the_damaged_file_and_leaf(run):
    flip_bit(largest_file(run / "30" / "model"))
    flip_bit(run / "20" / "commit_success.txt")
    (run / "10" / "ckpttools.manifest").unlink()
    ten, twenty, thirty = ct.verify(run).steps
    assert thirty.state == "corrupt"
    assert thirty.leaves == ("model.large",)
    assert thirty.files[0].startswith("model/ocdbt.process_0/d/")
    assert twenty.files == ("commit_success.txt",)
    assert "all leaves are still readable" in twenty.reason
    assert ten.state == "incomplete"
    assert "10 has no ckpttools.manifest" in ten.reason
    assert not ct.verify(run).ok


def test_verify_of_an_empty_folder(tmp_path):
    assert str(ct.verify(tmp_path)) == "no steps"


def small_files(folder):
    return [p for p in sorted(folder.rglob("*")) if p.is_file() and 0 < p.stat().st_size < 4096]


def test_repair_puts_back_every_small_file_bit_by_bit(run):
    before = snapshot_of(run / "30")
    for path in small_files(run / "30"):
        flip_bit(path)
    dry = ct.repair(run, dry_run=True)
    assert dry.dry_run
    assert "dry run" in str(dry)
    assert snapshot_of(run / "30") != before, "a dry run touches nothing"
    report = ct.repair(run)
    assert len(report.repairs) == len(small_files(run / "30"))
    assert snapshot_of(run / "30") == before
    assert str(ct.repair(run)) == "nothing to repair"
    assert restore(run).step == 30


def test_repair_puts_back_deleted_files_and_brings_a_step_home_from_quarantine(run):
    before = snapshot_of(run / "30")
    (run / "30" / "model" / "_METADATA").unlink()
    assert restore(run).step == 20
    assert not (run / "30").exists()
    report = ct.repair(run)
    assert "moved back to 30" in str(report)
    assert snapshot_of(run / "30") == before
    assert restore(run).step == 30


def test_repair_leaves_a_quarantined_step_whose_number_is_taken(run):
    flip_bit(run / "30" / "_CHECKPOINT_METADATA")
    with ct.open(spec_for(run)) as ckpt:
        (run / "30" / "model" / "_METADATA").unlink()
        ckpt.restore(STATE)
        ckpt.save(30, STATE)
    assert "left in quarantine" in str(ct.repair(run))


def test_repair_says_what_it_cannot_rebuild(run):
    flip_bit(largest_file(run / "30"))
    name = largest_file(run / "30").relative_to(run / "30").as_posix()
    (layout.get_spare_directory(run, 3) / name).unlink()
    report = ct.repair(run)
    assert f"damaged: {name}; cannot be rebuilt" in str(report)


def test_repair_puts_the_list_of_pins_back_or_begins_a_new_one(run):
    catalogue.write_pins(run, frozenset({20}))
    layout.get_control_path(run, "pins.json").write_text("{")
    assert "put back from its second copy: [20]" in str(ct.repair(run))
    assert catalogue.has_intact_pins(run)
    for name in ("pins.json", "pins.second.json"):
        layout.get_control_path(run, name).write_text("{")
    assert "an empty list begun" in str(ct.repair(run))
    assert catalogue.has_intact_pins(run)


def test_repair_of_no_folder_and_of_a_run_in_use(run, tmp_path):
    with pytest.raises(ct.StorageError, match="is no folder"):
        ct.repair(tmp_path / "nothing")
    with ct.open(spec_for(run)) as ckpt:
        ckpt.restore(STATE)
        ckpt.steps(99)
        with pytest.raises(ct.RunInUseError):
            ct.repair(run)
        assert str(ct.repair(run, dry_run=True)) == "nothing to repair"


def test_prune_says_what_it_would_delete_and_why(run):
    verdicts = ct.prune(run, ct.Latest(1), dry_run=True)
    assert [(v.step.step, v.keep) for v in verdicts] == [(10, False), (20, True), (30, True)]
    assert (run / "10").exists()
    ct.prune(run, ct.Latest(1))
    assert not (run / "10").exists()
    assert not layout.get_spare_directory(run, 1).exists()


class Plain(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(2, 2, rngs=rngs)])
        self.drop = nnx.Dropout(0.5, rngs=rngs)


def write_v0(folder, state):
    options = v0.CheckpointManagerOptions(max_to_keep=3, best_fn=lambda metrics: metrics["loss"])
    with v0.CheckpointManager(folder, options=options) as manager:
        args = v0.args.Composite(model=v0.args.StandardSave(state), extra=v0.args.JsonSave({"epoch": 4}))
        manager.save(3, args=args, metrics={"loss": 0.25})
        manager.wait_until_finished()


def test_a_listing_prints_as_a_table(tmp_path):
    assert str(ct.ls(tmp_path)) == "no steps"
    with ct.open(spec_for(tmp_path)) as ckpt:
        ckpt.save(3, {"model": {"w": np.ones(2)}}, metrics={"loss": 0.25})
    head, row = str(ct.ls(tmp_path)).splitlines()
    assert head.split() == ["step", "state", "saved", "size", "loss", "branch", "reason"]
    assert row.split()[:2] == ["3", "committed"]
    assert "0.25" in row
    assert "asked for" in row


def write_v1(folder, state):
    v1.save_checkpointables(folder / "3", {"model": state, "extra": {"epoch": 4}})


@pytest.mark.parametrize("write", [write_v0, write_v1], ids=["v0", "v1"])
def test_a_run_of_plain_orbax_is_listed_as_unverified_and_taken_over(tmp_path, write):
    model = Plain(nnx.Rngs(0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        write(tmp_path, nnx.state(model))
    before = snapshot_of(tmp_path / "3")
    assert [row.state for row in ct.ls(tmp_path)] == ["unverified"]
    fresh = Plain(nnx.Rngs(9))
    with ct.open(spec_for(tmp_path)) as ckpt:
        assert ckpt.latest_step() is None
        with pytest.raises(ct.NoIntactStepError, match=r"ct\.adopt"):
            ckpt.restore({"model": fresh})
        with pytest.raises(ct.NotRestoredError):
            ckpt.steps(9)
    assert ct.adopt(tmp_path, dry_run=True) == (3,)
    assert ct.adopt(tmp_path) == (3,)
    assert {name: data for name, data in snapshot_of(tmp_path / "3").items() if name.name != layout.MANIFEST} == before
    with ct.open(spec_for(tmp_path)) as ckpt:
        report = ckpt.restore({"model": fresh, "extra": {"epoch": 0}})
        assert report.step == 3
        assert report.state["extra"] == {"epoch": 4}
        if write is write_v0:
            assert report.metrics == {"loss": 0.25}
        ckpt.save(4, {"model": fresh})
    for got, want in zip(jax.tree.leaves(nnx.state(fresh)), jax.tree.leaves(nnx.state(model)), strict=True):
        if jnp.issubdtype(got.dtype, jax.dtypes.prng_key):
            got, want = jax.random.key_data(got), jax.random.key_data(want)
        np.testing.assert_array_equal(got, want)
    flip_bit(largest_file(tmp_path / "3"))
    assert not ct.verify(tmp_path, 3).ok


def test_a_step_that_orbax_cannot_read_is_not_taken_over(tmp_path):
    (tmp_path / "3").mkdir()
    (tmp_path / "3" / "_CHECKPOINT_METADATA").write_text("{}")
    with pytest.raises(ct.StorageError, match="step 3 cannot be taken over"):
        ct.adopt(tmp_path)
    (tmp_path / "empty").mkdir()
    assert ct.adopt(tmp_path / "empty") == ()


@pytest.mark.parametrize("thing", ["folder", "pipe", "link"])
def test_repair_puts_a_file_back_where_something_else_stands(run, tmp_path_factory, thing):
    victim = tmp_path_factory.mktemp("outside") / "victim"
    victim.write_text("gold")
    for name in ("commit_success.txt", layout.MANIFEST):
        place = run / "20" / name
        place.unlink()
        {"folder": place.mkdir, "pipe": lambda at=place: os.mkfifo(at), "link": lambda at=place: at.symlink_to(victim)}[
            thing
        ]()
    assert "20/commit_success.txt: damaged or missing; put back" in str(ct.repair(run))
    assert ct.verify(run).ok
    assert victim.read_text() == "gold"
    assert str(ct.repair(run)) == "nothing to repair", "what stood there is kept and is no step"


def test_repair_writes_nothing_through_a_linked_folder(run, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside") / "20"
    (run / "20").rename(outside)
    (run / "20").symlink_to(outside)
    (outside / "commit_success.txt").write_text("gold")
    assert "20 is a link" in str(ct.repair(run))
    assert (outside / "commit_success.txt").read_text() == "gold"


def test_a_lock_that_cannot_be_opened_is_an_error_of_the_disk(run):
    layout.get_control_path(run, "lock").unlink()
    layout.get_control_path(run, "lock").mkdir()
    with pytest.raises(ct.StorageError, match="cannot be opened"):
        ct.repair(run)


@pytest.mark.parametrize("tool", ["verify", "repair", "adopt", "prune"])
def test_a_misspelt_run_is_neither_intact_nor_created(tmp_path, tool):
    more = [ct.Latest(1)] if tool == "prune" else []
    with pytest.raises(ct.StorageError, match="is no folder"):
        getattr(ct, tool)(tmp_path / "typo", *more)
    assert not (tmp_path / "typo").exists()


def test_quarantine_is_emptied_when_asked_and_not_before_the_run_went_on(run):
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


def test_an_adopted_step_with_lists_and_tuples_is_proved_and_read(tmp_path):
    state = {"moments": (jnp.ones(2), [jnp.full(3, 2.0), jnp.full(1, 4.0)]), "w": jnp.zeros(2)}
    with v0.CheckpointManager(tmp_path) as manager:
        manager.save(3, args=v0.args.Composite(model=v0.args.StandardSave(state)))
    assert ct.adopt(tmp_path) == (3,)
    assert ct.verify(tmp_path).ok
    empty = jax.tree.map(jnp.zeros_like, state)
    loaded = ct.load(tmp_path, {"model": empty}).state["model"]
    assert jax.tree.map(lambda leaf: leaf.tolist(), loaded) == jax.tree.map(lambda leaf: leaf.tolist(), state)
    part = ct.load(tmp_path, {"model": empty}, only="model.moments.1.0").state["model"]
    assert [leaf.tolist() for leaf in jax.tree.leaves(part["moments"])] == [[0, 0], [2, 2, 2], [0]]
