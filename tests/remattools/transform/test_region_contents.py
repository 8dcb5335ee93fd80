# SPDX-License-Identifier: Apache-2.0
"""What a trace shows of the inside of regions."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import remattools as rt
from remattools.analysis.explain_call import trace_call
from remattools.tracing import pure_call
from remattools.transform.region_contents import describe_random, find_contents, make_structure_key
from tests.remattools.models import Tower, inputs

SHAPE = jax.ShapeDtypeStruct((2, 3, 8), jnp.float32)


def trace_plain(model, args):
    return trace_call(pure_call.stage(model, args))


class Noisy(nnx.Module):
    def __init__(self, width, rngs):
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        jax.debug.callback(lambda y: None, x)
        return jnp.sin(self.dropout(x))


def test_paths_of_values_are_relative_to_the_region():
    model = rt.apply(Tower(depth=2), {"layers.*": "nothing_saveable"})
    (contents,) = find_contents(trace_plain(model, [SHAPE]), [("layers", 1)])
    assert "attention.qkv" in {value.label for value in contents.values}
    assert contents.has_activations
    assert not contents.is_stacked
    assert contents.warnings == ()


def test_side_effects_are_reported():
    model = Tower(depth=1, block=Noisy)
    count = model.layers[0].dropout.rngs.count[...]
    (contents,) = find_contents(trace_plain(model, [SHAPE]), [("layers", 0)])
    assert "calls back to Python" in contents.warnings[0]
    assert len(contents.warnings) == 1
    assert model.layers[0].dropout.rngs.count[...] == count, "the trace ran on a copy"


class Dry(nnx.Module):
    def __init__(self, width, rngs):
        self.up = nnx.Linear(width, width, rngs=rngs)

    def __call__(self, x):
        return jnp.sin(self.up(x))


class Jittered(Dry):
    """Draws numbers that are not masks."""

    def __init__(self, width, rngs):
        super().__init__(width, rngs)
        self.rngs = rngs.fork()

    def __call__(self, x):
        return jnp.sin(self.up(x)) * jax.random.normal(self.rngs.noise(), x.shape)


@pytest.mark.parametrize(
    ("block", "action", "said"),
    [
        pytest.param(Noisy, rt.Remat(), ["recomputed from the same key", "masks dropout:lt"], id="drawn-again"),
        pytest.param(Noisy, rt.Remat("dots_saveable"), ["The policy dropout_masks_saveable saves"], id="other-policy"),
        pytest.param(
            Noisy, rt.Remat("dots_saveable | dropout_masks_saveable"), ["once: the masks dropout:lt"], id="saved"
        ),
        pytest.param(Noisy, rt.Remat(save=("dropout:lt",)), [], id="saved-by-name"),
        pytest.param(Dry, rt.Remat("dropout_masks_saveable"), ["draws no random numbers", "equal"], id="no-random"),
        pytest.param(Dry, rt.Remat(), [], id="control"),
        pytest.param(Jittered, rt.Remat("dropout_masks_saveable"), ["computes no mask", "equal"], id="no-mask"),
        pytest.param(Jittered, rt.Remat(), ["recomputed from the same key"], id="noise"),
    ],
)
def test_random_numbers_are_described_by_what_the_rule_saves(block, action, said):
    (contents,) = find_contents(trace_plain(Tower(depth=1, block=block), [SHAPE]), [("layers", 0)])
    text = describe_random(contents.values, action)
    assert bool(text) is bool(said)
    assert all(part in text for part in said)
    assert describe_random((), action) == ""


def test_a_linear_layer_has_no_activations():
    model = Tower(depth=1)
    (contents,) = find_contents(trace_plain(model, [inputs()]), [("layers", 0, "mlp", "up", "kernel")])
    assert not contents.has_activations


def test_equal_structure_gives_equal_keys():
    one, other = Tower(depth=2).layers
    assert make_structure_key(one, None) == make_structure_key(other, None)
    assert make_structure_key(one, None) != make_structure_key(other, rt.Remat())
    assert make_structure_key(Tower(width=4), None) != make_structure_key(Tower(width=8), None)
