# SPDX-License-Identifier: Apache-2.0
"""`adopt` gives the steps of plain Orbax a manifest, and refuses what Orbax cannot read."""

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
from ckpttools.store import catalogue, commit, layout
from ckpttools.store.run_directory import RunDirectory
from tests.ckpttools.restore.test_first_intact import flip_bit, largest_file, spec_for
from tests.ckpttools.store.writers import EMPTY, RUNS, SINGLES, STATE, write
from tests.ckpttools.tools.runs import snapshot_of


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


def write_v1(folder, state):
    v1.save_checkpointables(folder / "3", {"model": state, "extra": {"epoch": 4}})


@pytest.mark.parametrize("write", [write_v0, write_v1], ids=["v0", "v1"])
def test_a_run_of_plain_orbax_is_unverified_until_adopted(tmp_path, write):
    model = Plain(nnx.Rngs(0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        write(tmp_path, nnx.state(model))
    before = snapshot_of(tmp_path / "3")
    assert [row.state for row in ct.ls(tmp_path)] == ["unverified"]
    fresh = Plain(nnx.Rngs(9))
    with pytest.raises(ct.NotARunError, match=r"ct\.adopt"):
        ct.open(spec_for(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["3"]
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


def test_a_step_that_orbax_cannot_read_is_not_adopted(tmp_path):
    (tmp_path / "3").mkdir()
    (tmp_path / "3" / "_CHECKPOINT_METADATA").write_text("{}")
    with pytest.raises(ct.StorageError, match="step 3 cannot be adopted"):
        ct.adopt(tmp_path)
    (tmp_path / "empty").mkdir()
    assert ct.adopt(tmp_path / "empty") == ()


def test_an_adopted_step_with_lists_and_tuples_is_verified(tmp_path):
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


@pytest.mark.parametrize("name", RUNS)
def test_a_run_of_another_writer_is_adopted_verified_and_continued(tmp_path, name):
    run = write(RUNS[name], tmp_path / "run2")
    assert ct.adopt(run, dry_run=True) == (10, 20)
    with pytest.raises(ct.NotARunError):
        ct.open(spec_for(run))  # control: the dry run changed nothing
    assert ct.adopt(run) == (10, 20)
    assert ct.adopt(run) == ()
    report = ct.verify(run)
    assert (report.ok, [step.state for step in report.steps]) == (True, ["intact", "intact"])
    with ct.open(spec_for(run)) as ckpt:
        restored = ckpt.restore({"default": EMPTY})
        assert restored.step == 20
        np.testing.assert_array_equal(restored.state["default"]["w"], STATE["w"])
        ckpt.save(30, {"default": restored.state["default"]})
    assert [row.step for row in ct.ls(run)] == [10, 20, 30]
    assert ct.diff(run / "20", run / "30").changed == ()


@pytest.mark.parametrize("name", SINGLES)
def test_a_single_checkpoint_is_adopted_into_a_run(tmp_path, name):
    path = write(SINGLES[name], tmp_path / "best")
    before = snapshot_of(tmp_path)
    with pytest.raises(ct.NotARunError, match="best") as caught:
        ct.adopt(path)
    assert "--into runs/new" in caught.value.fix
    assert ct.adopt(path, into=tmp_path / "run", step=7) == (7,)
    assert ct.verify(tmp_path / "run").ok
    assert {place: data for place, data in snapshot_of(tmp_path).items() if "run" not in place.parts} == before
    with ct.open(spec_for(tmp_path / "run")) as ckpt:
        restored = ckpt.restore({"default": EMPTY})
    assert restored.step == 7
    np.testing.assert_array_equal(restored.state["default"]["nested"]["b"], STATE["nested"]["b"])


def test_a_number_that_is_taken_is_not_adopted(tmp_path):
    run = write(RUNS["manager, prefix"], tmp_path)
    (run / "ckpt_20").rename(run / "b_10")
    before = snapshot_of(run)
    with pytest.raises(ct.StepOrderError, match="cannot become step 10"):
        ct.adopt(run)
    assert snapshot_of(run) == before


@pytest.mark.parametrize("name", ["manager, prefix", "flax", "pytree"])
def test_a_damaged_foreign_step_is_named_and_not_adopted(tmp_path, name):
    run = write(RUNS[name], tmp_path)
    (broken,) = (path for path in run.iterdir() if path.name.endswith("20"))
    for path in [broken] if broken.is_file() else broken.rglob("manifest.ocdbt"):
        path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(ct.StorageError, match="step 20 cannot be adopted"):
        ct.adopt(run)
    assert broken.exists()
    assert not (run / "20").exists()
    # The older step was adopted; the newer one is still in the way of a restore that would pass it over.
    with pytest.raises(ct.NotARunError, match=broken.name):
        ct.open(spec_for(run))
    assert ct.load(run, {"default": EMPTY}).step == 10
    broken.rename(tmp_path.parent / f"aside-{name}")
    with ct.open(spec_for(run)) as ckpt:
        assert ckpt.restore({"default": EMPTY}).step == 10


def test_a_kill_between_rename_and_manifest_loses_nothing(tmp_path, monkeypatch):
    run = write(RUNS["manager, padded"], tmp_path)

    def die(*args, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(commit, "write_file", die)
        with pytest.raises(KeyboardInterrupt):
            ct.adopt(run)
    assert [row.state for row in ct.ls(run)] == ["unverified", "unverified"]
    assert ct.adopt(run) == (10, 20)
    assert ct.verify(run).ok


@pytest.mark.parametrize("copied", [False, True], ids=["in-place", "into"])
def test_what_a_killed_adoption_left_is_not_a_file_of_the_step(tmp_path, monkeypatch, copied):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        write_v1(tmp_path / "plain", {"w": jnp.ones(2)})

    def die(source, target):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", die)
        with pytest.raises(KeyboardInterrupt):
            ct.adopt(tmp_path / "plain")
    assert not (tmp_path / "plain" / "3" / "ckpttools.manifest.new").exists()
    (tmp_path / "plain" / "3" / "ckpttools.manifest.new").write_text("left by an earlier version")
    before = snapshot_of(tmp_path / "plain" / "3")
    run = tmp_path / "run" if copied else tmp_path / "plain"
    assert ct.adopt(tmp_path / "plain", into=run if copied else None) == (3,)
    names = {path.relative_to(run / "3").as_posix() for path in (run / "3").rglob("*") if path.is_file()}
    assert "ckpttools.manifest.new" not in names
    assert set(catalogue.scan(run).entries[0].manifest.summary.files) == names - {layout.MANIFEST}
    assert not copied or snapshot_of(tmp_path / "plain" / "3") == before, "control: the source is only read"
    with RunDirectory(run).hold_for_writing():
        assert not list(layout.get_control_path(run).glob("*.new"))
