# SPDX-License-Identifier: Apache-2.0
"""What is rebuilt from a spec is a copy of what was captured."""

import types

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from remattools.transform.capture.rebuild import rebuild
from remattools.transform.capture.walk import capture
from tests.remattools.models import Block


def copy(value):
    captured = capture(value)
    return rebuild(captured.spec, captured.leaves, [])


@pytest.mark.parametrize(
    "value",
    [
        pytest.param({"a": [jnp.ones(2), "text"], "b": (None, 3)}, id="containers"),
        pytest.param(types.SimpleNamespace(cache=jnp.ones(2), name="k"), id="plain-object"),
        pytest.param(Block(4, nnx.Rngs(0)), id="module"),
    ],
)
def test_a_rebuilt_value_is_equal_but_another_object(value):
    again = copy(value)
    assert again is not value
    assert type(again) is type(value)
    assert capture(again).spec == capture(value).spec
    for leaf, other in zip(capture(again).leaves, capture(value).leaves, strict=True):
        np.testing.assert_array_equal(leaf, other)


def test_shared_objects_and_cycles_stay_shared():
    shared = [jnp.ones(2)]
    cycle = {"shared": shared, "again": shared}
    cycle["self"] = cycle
    again = copy(cycle)
    assert again["shared"] is again["again"] is not shared
    assert again["self"] is again


def test_objects_without_arrays_stay_themselves():
    config = types.SimpleNamespace(width=3)
    assert copy([config, jnp.ones(2)])[0] is config
