# SPDX-License-Identifier: Apache-2.0
"""Checkpoints and weight loaders written for the plain model work on the one under rules, and vice versa."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from orbax.checkpoint import v1 as ocp

import ckpttools as ct
import remattools as rt

from ..models import Tower, inputs

RULES = {"layers.*": rt.Remat("dots_saveable", save=("attention.qkv",)), "layers.[-1]": False, "*norm": rt.Remat()}


def plain(seed):
    return Tower(seed=seed)


def ruled(seed):
    return rt.apply(Tower(seed=seed), RULES)


def same(one, other):
    one, other = nnx.to_pure_dict(nnx.state(one)), nnx.to_pure_dict(nnx.state(other))
    assert jax.tree.structure(one) == jax.tree.structure(other)
    return all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True))


@pytest.fixture(
    params=[(plain, ruled), (ruled, plain), (ruled, ruled)], ids=["plain-ruled", "ruled-plain", "ruled-ruled"]
)
def pair(request):
    """A written model and another one to read into."""
    writer, reader = request.param
    written, read = writer(0), reader(1)
    assert not same(written, read)
    return written, read


def check(written, read):
    assert same(written, read)
    np.testing.assert_array_equal(
        jax.jit(lambda m, x: m(x))(written, inputs()), jax.jit(lambda m, x: m(x))(read, inputs())
    )


def test_an_orbax_checkpoint(pair, tmp_path):
    written, read = pair
    ocp.save(tmp_path / "step", nnx.to_pure_dict(nnx.state(written)))
    state = nnx.state(read)
    nnx.replace_by_pure_dict(state, ocp.load(tmp_path / "step", nnx.to_pure_dict(state)))
    nnx.update(read, state)
    check(written, read)


def test_a_checkpoint_of_ckpttools_with_its_optimizer(pair, tmp_path):
    written, read = pair
    states = [{"model": m, "optimizer": nnx.Optimizer(m, optax.adam(1e-3), wrt=nnx.Param)} for m in (written, read)]
    spec = ct.CheckpointSpec(directory=tmp_path)
    with ct.open(spec) as ckpt:
        ckpt.save(1, states[0])
    with ct.open(spec) as ckpt:
        ckpt.restore(states[1])
    check(written, read)


def test_a_loader_that_walks_the_flat_state(pair):
    """What most loaders of pretrained weights do: assign by path, without a graph."""
    written, read = pair
    weights = {path: np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(nnx.state(written, nnx.Param))}
    state = nnx.state(read, nnx.Param)
    for path, leaf in nnx.to_flat_state(state):
        leaf[...] = jnp.asarray(weights[path])
    nnx.update(read, state)
    check(written, read)


def test_a_loader_that_assigns_attributes(pair):
    written, read = pair
    for target, source in zip(read.layers, written.layers, strict=True):
        for name in ("qkv", "out"):
            getattr(target.attention, name).kernel[...] = getattr(source.attention, name).kernel[...]
            getattr(target.attention, name).bias = nnx.Param(getattr(source.attention, name).bias[...])
        nnx.update(target.mlp, nnx.state(source.mlp))
        nnx.update(target.norm, nnx.state(source.norm))
    read.head.kernel[...], read.head.bias[...] = written.head.kernel[...], written.head.bias[...]
    check(written, read)


def test_a_loader_that_builds_abstractly_and_merges(pair):
    """`nnx.eval_shape`, split, fill, merge: rules applied to the abstract model stay in force after the merge."""
    written, _ = pair
    graphdef, state = nnx.split(rt.apply(nnx.eval_shape(lambda: Tower(seed=1)), RULES))
    nnx.replace_by_pure_dict(state, nnx.to_pure_dict(nnx.state(written)))
    merged = nnx.merge(graphdef, state)
    assert len(rt.explain(merged).regions) > 0
    check(written, merged)
