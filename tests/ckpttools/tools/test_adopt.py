# SPDX-License-Identifier: Apache-2.0
"""`adopt` gives the steps of plain Orbax a manifest, and refuses what Orbax cannot read."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as v0
import pytest
from flax import nnx
from orbax.checkpoint import v1

import ckpttools as ct
from ckpttools.store import layout
from tests.ckpttools.restore.test_first_intact import flip_bit, largest_file, spec_for
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
def test_a_run_of_plain_orbax_is_listed_as_unverified_and_taken_over(tmp_path, write):
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


def test_a_step_that_orbax_cannot_read_is_not_taken_over(tmp_path):
    (tmp_path / "3").mkdir()
    (tmp_path / "3" / "_CHECKPOINT_METADATA").write_text("{}")
    with pytest.raises(ct.StorageError, match="step 3 cannot be adopted"):
        ct.adopt(tmp_path)
    (tmp_path / "empty").mkdir()
    assert ct.adopt(tmp_path / "empty") == ()


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
