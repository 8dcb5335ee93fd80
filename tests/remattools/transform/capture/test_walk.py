# SPDX-License-Identifier: Apache-2.0
"""Arrays, spec and objects of a call."""

import jax.numpy as jnp
from flax import nnx

from remattools.transform.capture.walk import capture
from tests.remattools.models import Block


def test_only_arrays_are_leaves():
    captured = capture(({"a": jnp.ones(2), "mode": "train"}, 3, [jnp.zeros(3)]))
    assert [leaf.shape for leaf in captured.leaves] == [(2,), (3,)]
    assert captured.unshareable is None


def test_equal_blocks_have_equal_specs():
    one, other = Block(8, nnx.Rngs(0)), Block(8, nnx.Rngs(1))
    assert capture(one).spec == capture(other).spec
    assert hash(capture(one).spec) == hash(capture(other).spec)
    other.mlp.scale = 2.0
    assert capture(one).spec != capture(other).spec, "control: a static value differs"


def test_a_shared_array_variable_is_one_leaf():
    linear = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    assert len(capture((linear, linear)).leaves) == len(capture(linear).leaves) == 2


def test_an_iterator_prevents_sharing():
    iterator = iter([1])
    assert capture([iterator]).unshareable is iterator
