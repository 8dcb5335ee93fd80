# SPDX-License-Identifier: Apache-2.0
"""Typed random keys grow and shrink with the layers they belong to, and come back from their raw data."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx, serialization

import ckpttools as ct


class Block(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(4, 4, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)


class Scanned(nnx.Module):
    def __init__(self, depth, seed):
        @nnx.split_rngs(splits=depth)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def make(rngs):
            return Block(rngs)

        self.blocks = make(nnx.Rngs(seed))
        self.head = nnx.Linear(4, 2, rngs=nnx.Rngs(seed))


def save(directory, state):
    with ct.open(ct.CheckpointSpec(directory=directory)) as ckpt:
        ckpt.save(1, state)


def find_surgery(directory, state):
    with pytest.raises(ct.StructureError) as caught:
        ct.load(directory, state)
    return caught.value


def key_data(model):
    return np.asarray(jax.random.key_data(model.blocks.dropout.rngs.key[...]))


@pytest.mark.parametrize("depth", [6, 3])
def test_another_depth_keeps_the_keys_and_all_other_leaves(tmp_path, depth):
    save(tmp_path, {"model": Scanned(4, seed=1)})
    model, stored, fresh = Scanned(depth, seed=2), Scanned(4, seed=1), Scanned(depth, seed=2)
    error = find_surgery(tmp_path, {"model": model})
    assert ("fresh random keys in 1 leaf (model.blocks.dropout.rngs.key)" in error.fix) is (depth > 4)
    report = ct.load(tmp_path, {"model": model}, surgery=error.surgery)
    assert {leaf.action for leaf in report.altered} == {"padded" if depth > 4 else "sliced"}
    same = min(depth, 4)
    for get in (key_data, lambda each: np.asarray(each.blocks.linear.kernel[...])):
        assert np.array_equal(get(model)[:same], get(stored)[:same])
        assert np.array_equal(get(model)[same:], get(fresh)[same:])
    assert len(np.unique(key_data(model), axis=0)) == depth, "no two layers share a key"
    assert np.array_equal(model.head.kernel, stored.head.kernel)


def test_a_number_never_fills_keys(tmp_path):
    save(tmp_path, {"model": Scanned(4, seed=1)})
    model = Scanned(6, seed=2)
    ct.load(tmp_path, {"model": model}, surgery=[ct.Pad("model.blocks", fill=0.0)])
    assert not np.any(np.asarray(model.blocks.linear.kernel[...])[4:]), "control: the number fills arrays"
    assert np.array_equal(key_data(model)[4:], key_data(Scanned(6, seed=2))[4:])
    abstract = nnx.eval_shape(lambda: Scanned(6, seed=2))
    with pytest.raises(ct.StructureError, match=r"rngs\.key.* abstract"):
        ct.load(tmp_path, {"model": abstract}, surgery=[ct.Pad("model.blocks", fill=0.0)])


def test_keys_of_another_kind_are_not_resized(tmp_path):
    save(tmp_path, {"keys": jax.random.split(jax.random.key(0), 4), "w": jnp.ones(2)})
    state = {"keys": jax.random.split(jax.random.key(0, impl="rbg"), 6), "w": jnp.zeros(2)}
    assert not any(isinstance(each, ct.Pad) for each in find_surgery(tmp_path, state).surgery)


@pytest.mark.parametrize("implementation", ["threefry2x32", "rbg"])
@pytest.mark.parametrize("shape", [(), (3,)], ids=["one", "several"])
def test_raw_keys_of_msgpack_become_typed_keys(tmp_path, implementation, shape):
    key = jax.random.key(5, impl=implementation)
    key = jax.random.split(key, shape) if shape else key
    tree = {"dropout": jax.random.key_data(key), "w": jnp.ones(2)}
    file = tmp_path / "checkpoint_7"
    file.write_bytes(serialization.to_bytes(tree))
    ct.adopt(file, into=tmp_path / "run", step=7)
    zero = jax.random.key(0, impl=implementation)
    fresh = {"dropout": jax.random.split(zero, shape) if shape else zero, "w": jnp.zeros(2)}
    for source in (file, tmp_path / "run"):
        report = ct.load(source, {"default": fresh})
        assert [(leaf.name, leaf.action) for leaf in report.altered] == [("default.dropout", "wrapped")]
        found = report.state["default"]["dropout"]
        assert found.dtype == key.dtype
        assert np.array_equal(jax.random.key_data(found), tree["dropout"])
        renamed = find_surgery(source, {"model": {"dropout_key": fresh["dropout"], "w": fresh["w"]}})
        assert "nothing on disk is lost" in renamed.fix
        state = {"model": {"dropout_key": fresh["dropout"], "w": fresh["w"]}}
        found = ct.load(source, state, surgery=renamed.surgery).state["model"]["dropout_key"]
        assert np.array_equal(jax.random.key_data(found), tree["dropout"])


def test_typed_keys_restore_into_their_raw_data(tmp_path):
    keys = jax.random.split(jax.random.key(5), 3)
    save(tmp_path, {"keys": keys})
    report = ct.load(tmp_path, {"keys": jnp.zeros((3, 2), jnp.uint32)})
    assert [leaf.action for leaf in report.altered] == ["unwrapped"]
    assert np.array_equal(report.state["keys"], jax.random.key_data(keys))


@pytest.mark.parametrize("form", [((3, 4), jnp.uint32), ((3, 2), jnp.int32), ((2, 3), jnp.uint32)], ids=str)
def test_an_array_that_is_not_key_data_is_refused(tmp_path, form):
    """Control."""
    save(tmp_path, {"keys": jax.random.split(jax.random.key(5), 3)})
    find_surgery(tmp_path, {"keys": jnp.zeros(*form)})
