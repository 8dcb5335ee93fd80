# SPDX-License-Identifier: Apache-2.0
"""Caches that other programs and earlier versions saved are no loss of a suggested surgery."""

import warnings

import jax.numpy as jnp
import pytest
from flax import nnx
from orbax.checkpoint import v1

import ckpttools as ct
from ckpttools.surgery.recomputed import find_recomputed


class Net(nnx.Module):
    def __init__(self, name, value, *, caches=True, cached="cached_key"):
        layer = nnx.Dict(w=nnx.Param(jnp.full((3, 2), value)))
        if caches:
            layer[cached] = nnx.Cache(jnp.full((3, 2), 7.0))
            layer["sown"] = nnx.Intermediate((jnp.full(5, 7.0),))
        setattr(self, name, layer)


def save_as_orbax(directory, model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        v1.save_checkpointables(directory / "3", {"model": nnx.to_pure_dict(nnx.state(model))})
    return directory


def find_error(directory, state):
    with pytest.raises(ct.StructureError) as caught:
        ct.load(directory, state)
    return caught.value


@pytest.mark.parametrize(
    ("name", "caches", "cached"),
    [
        pytest.param("new", True, "cached_key", id="renamed, and the program has caches"),
        pytest.param("new", True, "memo", id="renamed, and only the program names them"),
        pytest.param("new", False, "cached_key", id="renamed, and only flax names them"),
        pytest.param("old", False, "cached_key", id="not renamed, and only flax names them"),
    ],
)
def test_caches_of_a_foreign_checkpoint_are_no_loss(tmp_path, name, caches, cached):
    old, new = Net("old", 5.0, cached=cached), Net(name, 0.0, caches=caches, cached=cached)
    if not caches:
        del old.old["sown"]  # Nothing tells what it is.
    directory = save_as_orbax(tmp_path, old)
    error = find_error(directory, {"model": new})
    assert "nothing on disk is lost and nothing in the state stays as initialised" in error.fix
    assert f"recomputed variables are not state: {2 if caches else 1} lea" in error.fix
    ct.load(directory, {"model": new}, surgery=error.surgery)
    layer = getattr(new, name)
    assert layer["w"][0, 0] == 5.0
    assert not caches or layer[cached][0, 0] == 7.0


def test_a_cache_is_never_the_source_of_a_parameter(tmp_path):
    directory = save_as_orbax(tmp_path, Net("old", 5.0))
    error = find_error(directory, {"model": {"old": {"w": jnp.zeros((3, 2)), "key_cached": jnp.zeros((3, 2))}}})
    assert "model.old.key_cached" in error.fix.partition("as initialised")[2]


def test_what_a_run_saves_on_purpose_is_a_loss(tmp_path):
    """Control."""
    with ct.open(ct.CheckpointSpec(directory=tmp_path, exclude=())) as ckpt:
        ckpt.save(1, {"model": Net("old", 5.0)})
    assert "throws away" in find_error(tmp_path, {"model": Net("old", 0.0, caches=False)}).fix


def test_a_name_that_the_state_uses_is_state():
    stored, excluded = [("m", "old", "memo"), ("m", "old", "w")], [("m", "new", "memo")]
    assert find_recomputed(stored, [("m", "new", "w")], excluded, ["Cache"]) == {("m", "old", "memo")}
    assert find_recomputed(stored, [("m", "other", "memo")], excluded, ["Cache"]) == frozenset(), "control"


@pytest.mark.parametrize(
    ("path", "types", "found"),
    [
        (("default", "cache", "layer", "k"), ["Cache"], True),
        (("default", "intermediates", "layer", "k", "0"), ["Intermediate"], True),
        (("model", "attention", "cached_value", "value"), ["Cache"], True),
        (("model", "attention", "cached_value"), ["BatchStat"], False),
        (("default", "params", "cache", "kernel"), ["Cache"], False),
    ],
    ids=str,
)
def test_names_of_flax_are_known(path, types, found):
    assert (find_recomputed([path], [], [], types) == {path}) is found
