# SPDX-License-Identifier: Apache-2.0
"""Factories: what they may return, and the errors for everything else."""

import sys

import jax.numpy as jnp
import pytest
from flax import nnx

import remattools as rt
from remattools.cli import subject

FACTORIES = """
import jax.numpy as jnp
from flax import nnx

def function():
    return jnp.sum, (jnp.ones(3),)

def single_argument():
    return jnp.sum, jnp.ones(3)

def model():
    return nnx.Linear(2, 2, rngs=nnx.Rngs(0)), (jnp.ones((1, 2)),)

def model_alone():
    return nnx.Linear(2, 2, rngs=nnx.Rngs(0))

def number():
    return 3
"""


@pytest.fixture
def load(tmp_path, monkeypatch):
    path = tmp_path / "subject_factories.py"
    path.write_text(FACTORIES)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield lambda name, **options: subject.load_subject(f"{path}:{name}", **options)
    sys.modules.pop("subject_factories", None)


@pytest.mark.parametrize("name", ["function", "single_argument"])
def test_a_function_is_taken_with_its_arguments(load, name):
    loaded = load(name)
    assert loaded.fn is jnp.sum
    assert [arg.shape for arg in loaded.args] == [(3,)]
    assert loaded.inputs is None


def test_a_model_becomes_the_sum_of_its_outputs(load):
    loaded = load("model")
    model, x = loaded.args
    assert isinstance(model, nnx.Linear)
    assert float(loaded.fn(model, x)) == pytest.approx(float(model(x).sum()))
    assert [each.shape for each in loaded.inputs] == [(1, 2)]


def test_a_model_alone_needs_permission(load):
    assert isinstance(load("model_alone", allow_model=True).args[0], nnx.Linear)
    with pytest.raises(rt.MeasureError, match="returned Linear") as caught:
        load("model_alone")
    assert "return model, (x,)" in caught.value.fix


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        pytest.param("number", "returned int", id="not a call"),
        pytest.param("numbr", "has no function 'numbr'", id="misspelled"),
    ],
)
def test_other_factories_raise(load, name, expected):
    with pytest.raises(rt.MeasureError, match=expected):
        load(name)
