# SPDX-License-Identifier: Apache-2.0
"""Models that functions refer to are found and replaced; the functions stay what they were."""

import functools

import jax
import pytest
from flax import nnx

from remattools.tracing import closed_over

MODEL = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
OTHER = nnx.Linear(2, 2, rngs=nnx.Rngs(1))
TABLE = {"model": MODEL}


def _uses_global(x):
    return MODEL(x)


def _uses_a_function_that_does(x):
    return _uses_global(x)


def _uses_it_inside(x):
    return (lambda y: MODEL(y))(x)


def _has_default(x, model=MODEL):
    return model(x)


def _has_keyword(x, *, model=MODEL):
    return model(x)


def _closes_over(model):
    return lambda x: model(x)


def _refers_to_itself(model):
    def again(x, depth=2):
        return model(x) if depth == 0 else again(x, depth - 1)

    return again


class _Trainer:
    def __init__(self, model):
        self.model = model

    def __call__(self, x):
        return self.model(x)

    def loss(self, x):
        return self.model(x)


@pytest.mark.parametrize(
    "fn",
    [
        pytest.param(_uses_global, id="global"),
        pytest.param(_uses_a_function_that_does, id="global of a called function"),
        pytest.param(_uses_it_inside, id="in an inner function"),
        pytest.param(_has_default, id="default"),
        pytest.param(_has_keyword, id="keyword default"),
        pytest.param(_closes_over(MODEL), id="cell"),
        pytest.param(_closes_over(_closes_over(MODEL)), id="cell of a cell"),
        pytest.param(functools.partial(lambda m, x: m(x), MODEL), id="partial"),
        pytest.param(functools.partial(lambda x, m: m(x), m=MODEL), id="partial by keyword"),
        pytest.param(_Trainer(MODEL).loss, id="method of an object"),
        pytest.param(_Trainer(MODEL), id="object that can be called"),
        pytest.param(MODEL.__call__, id="method of the model"),
        pytest.param(MODEL, id="the model itself"),
        pytest.param(jax.jit(_closes_over(MODEL)), id="jitted"),
        pytest.param(jax.checkpoint(_closes_over(MODEL)), id="checkpointed"),
    ],
)
def test_models_are_found_and_replaced(fn):
    x = jax.numpy.ones((1, 2))
    assert [value for _, value in closed_over.find_captured_models(fn)] == [MODEL]
    replaced = closed_over.replace_models(fn, {id(MODEL): OTHER})
    assert (replaced(x) == OTHER(x)).all()
    assert (fn(x) == MODEL(x)).all()  # control: the given function is unchanged


def test_containers_are_one_value():
    def by_name(x):
        return TABLE["model"](x)

    ((name, value),) = closed_over.find_captured_models(by_name)
    assert (name, value) == ("TABLE", TABLE)


def test_functions_without_models_are_left_alone():
    def plain(x):
        return x + 1

    assert closed_over.find_captured_models(plain) == []
    assert closed_over.replace_models(plain, {1: OTHER}) is plain
    partial = functools.partial(plain, 1)
    assert closed_over.replace_models(partial, {1: OTHER}) is partial


def test_recursion_and_empty_cells_end():
    assert [value for _, value in closed_over.find_captured_models(_refers_to_itself(MODEL))] == [MODEL]
    assert closed_over.find_captured_models(_unfilled()) == []


def _unfilled():
    def inner():
        return later

    if False:
        later = 1
    return inner
