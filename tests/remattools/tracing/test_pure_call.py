# SPDX-License-Identifier: Apache-2.0
"""Calls as functions of their arrays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import remattools as rt
from remattools.tracing import pure_call
from tests.remattools.models import Tower, inputs, loss


def test_leaves_have_model_paths_and_argument_names():
    call = pure_call.stage(lambda batch, model: loss(model, batch["x"]), [{"x": inputs()}, Tower(depth=1)])
    labels = {info.label: info.parameter for info in call.leaf_infos}
    assert labels["batch.x"] is False
    assert labels["layers.0.mlp.up.kernel"] is True
    assert call.arity == 2


def test_a_model_that_is_closed_over_counts_as_a_model():
    model = Tower(depth=1)
    call = pure_call.stage(lambda x: loss(model, x), [inputs()])
    assert call.models == [model]
    assert len(call.differentiable_indices) == len(jax.tree.leaves(nnx.state(model, nnx.Param)))


def test_the_pure_function_computes_the_call_and_its_gradients():
    model, x = Tower(depth=1), inputs()
    call = pure_call.stage(loss, [model, x])
    (value, *_) = pure_call.make_pure(call)(call.leaves)
    np.testing.assert_allclose(value, loss(model, x), rtol=1e-6)
    gradients, _ = pure_call.make_pure(call, differentiate=True)(call.leaves)
    expected = jax.tree.leaves(nnx.grad(loss)(model, x))
    assert sorted(float(jnp.abs(g).sum()) for g in gradients) == pytest.approx(
        sorted(float(jnp.abs(g).sum()) for g in expected), rel=1e-4, abs=1e-4
    )


def test_a_result_that_is_not_a_scalar_has_no_loss():
    call = pure_call.stage(lambda x: 2 * x, [inputs()])
    with pytest.raises(rt.MeasureError, match=r"float32\[4, 6, 8\], which has no gradient"):
        pure_call.split_loss(pure_call.evaluate(call, call.leaves))


def test_integers_cannot_be_differentiated():
    pure_call.check_differentiable(pure_call.stage(jnp.sum, [jnp.ones(3)]))  # control
    with pytest.raises(rt.MeasureError, match="no argument of the function can be differentiated"):
        pure_call.check_differentiable(pure_call.stage(jnp.sum, [jnp.arange(3)]))


def test_a_value_that_is_not_a_function_raises():
    with pytest.raises(rt.MeasureError, match="3 is not a function"):
        pure_call.stage(3, [])
