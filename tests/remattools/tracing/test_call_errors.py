# SPDX-License-Identifier: Apache-2.0
"""Errors of the user's function name the call, and wrong orders of arguments are recognised."""

import jax.numpy as jnp
import pytest
from flax import nnx

import remattools as rt
from remattools.tracing.call_errors import check_call, explain_errors, get_argument_names

MODEL = nnx.Linear(2, 2, rngs=nnx.Rngs(0))


def apply_model(model, x, *, scale=1.0):
    return model(x) * scale


def test_the_signature_is_checked_before_the_call():
    check_call(apply_model, (MODEL, jnp.ones(2)))  # control
    with pytest.raises(rt.MeasureError, match="missing a required argument: 'x'"):
        check_call(apply_model, (MODEL,))


def test_a_model_in_the_place_of_the_function_is_recognised():
    with pytest.raises(rt.MeasureError, match="Linear was passed as the function, and apply_model as its argument"):
        check_call(MODEL, (apply_model, MODEL, jnp.ones(2)))


def test_the_users_error_gets_a_note_once():
    with pytest.raises(KeyError) as caught, explain_errors(apply_model, (MODEL, jnp.ones(2)), 0):  # noqa: SIM117
        with explain_errors(apply_model, (MODEL, jnp.ones(2)), 0):
            raise KeyError("missing")
    assert caught.value.__notes__ == ["remattools traced the call apply_model(model=Linear, x=float32[2])."]


def test_an_array_in_the_place_of_the_model_is_recognised():
    error = TypeError("'DynamicJaxprTracer' object is not callable")
    with pytest.raises(rt.MeasureError, match="an array where it expects the model"):  # noqa: SIM117
        with explain_errors(apply_model, (jnp.ones(2), MODEL), 1):
            raise error
    with pytest.raises(TypeError), explain_errors(apply_model, (MODEL, jnp.ones(2)), 0):
        raise error  # control: the model is where it belongs


def test_arguments_without_a_name_are_numbered():
    assert get_argument_names(apply_model, 2) == ["model", "x"]
    assert get_argument_names(lambda *args: args, 2) == ["arg0", "arg1"]
