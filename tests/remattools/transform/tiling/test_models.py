# SPDX-License-Identifier: Apache-2.0
"""Models as people write them, with tiles on their parts and their loss: training does not notice."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import remattools as rt

from .models import SUBJECTS

_TILE = rt.Tile(4)
RULES = {
    "parts": {"{attn,mlp}*": _TILE},
    "parts in regions": {"layers.*": "dots_saveable", "{attn,mlp}*": _TILE},
    "blocks": {"layers.*": _TILE},
    "blocks that are regions": {"layers.*": rt.Remat(save=("attn*",)) & _TILE},
    "groups": {"layers.*": rt.Remat(group=2), "{attn,mlp}*": _TILE},
    "model": {".": _TILE},
}
# All other pairs are long.
QUICK = {("gpt-threefry", rules) for rules in RULES} | {(name, "parts") for name in SUBJECTS}
PAIRS = [
    pytest.param(name, rules, id=f"{name}: {rules}", marks=() if (name, rules) in QUICK else pytest.mark.long)
    for name in SUBJECTS
    for rules in RULES
    if not name.startswith("mixed-precision")
]


@pytest.fixture(autouse=True)
def _in_float64():
    with jax.enable_x64(True):
        yield


def train(loss, model, batch):
    """Take one step, as users write it, and return what it leaves: loss, gradients, state, counters."""

    @nnx.jit
    def step(model, *batch):
        return nnx.value_and_grad(loss)(model, *batch)

    value, gradients = step(model, *batch)
    return {"loss": value, "gradients": nnx.to_pure_dict(gradients), "state": nnx.to_pure_dict(nnx.state(model))}


@functools.cache
def train_plain(name):
    subject = SUBJECTS[name]
    return train(subject.loss, subject.make(), subject.draw())


def train_tiled(name, rules):
    subject = SUBJECTS[name]
    model = rt.apply(subject.make(), RULES[rules], strict=False)
    return train(rt.tile(subject.loss, pieces=4), model, subject.draw())


def measure_errors(found, expected):
    """The largest error of each floating-point leaf, as a share of its scale; other leaves have to be equal."""
    pairs = [(_read(a), _read(b)) for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)]
    scales = [np.abs(b).max() for _, b in pairs if jnp.issubdtype(b.dtype, jnp.inexact)]
    median = float(np.median(scales))
    for a, b in pairs:
        if jnp.issubdtype(b.dtype, jnp.inexact):
            yield np.abs(np.float64(a) - np.float64(b)).max() / max(float(np.abs(b).max()), median)
        else:
            np.testing.assert_array_equal(a, b)


def _read(leaf):
    is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(leaf) if is_key else leaf)


@pytest.mark.parametrize(("name", "rules"), PAIRS)
def test_a_training_step_is_that_of_the_plain_model(name, rules):
    assert max(measure_errors(train_tiled(name, rules), train_plain(name))) <= 1e-12


def test_mixed_precision_is_as_near_to_float64_as_without_tiles():
    exact = train_plain("mixed-precision-exact")["gradients"]
    plain, tiled = (
        max(measure_errors(found["gradients"], exact))
        for found in (train_plain("mixed-precision"), train_tiled("mixed-precision", "parts"))
    )
    assert 1e-4 < tiled <= 1.1 * plain


def test_control_a_wrong_gradient_is_noticed():
    expected = train_plain("gpt-threefry")
    wrong = {**expected, "gradients": jax.tree.map(lambda leaf: leaf * (1 + 1e-9), expected["gradients"])}
    assert max(measure_errors(wrong, expected)) > 1e-12
