# SPDX-License-Identifier: Apache-2.0
"""Slices and reshapes of large values move before what computes them, where that is equal."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from remattools import Tile
from remattools.jaxpr import jaxprs
from remattools.transform.tiling.evaluate import run_program
from remattools.transform.tiling.normal_form import normalize

X, W = jnp.sin(jnp.arange(48.0)).reshape(2, 6, 4), jnp.cos(jnp.arange(32.0)).reshape(4, 8)


def _sliced(x, w):
    return jnp.exp(jnp.tanh(x @ w)[:, 1:-1])


def _merged(x, w):
    return jnp.exp(jnp.tanh(x @ w).reshape(-1, 8))


def _sliced_and_merged(x, w):
    return jnp.exp(jnp.tanh(x @ w)[:, :-1].reshape(-1, 8))


def _read_twice(x, w):
    y = jnp.tanh(x @ w)
    return jnp.exp(y[:, 1:]).sum() + y.sum()


def _summed_along(x, w):
    return jnp.exp(jnp.cumsum(x @ w, axis=1)[:, 1:])


def _normalize(fn):
    return normalize(jax.make_jaxpr(lambda x, w: fn(x, w).sum())(X, W))


def _find_shape(program):
    """The shape that the matrix product computes."""
    return next(node.outvars[0].aval.shape for node in program.nodes if node.primitive.name == "dot_general")


@pytest.mark.parametrize(
    ("fn", "shape"),
    [
        pytest.param(_sliced, (2, 4, 8), id="slice"),
        pytest.param(_merged, (12, 8), id="reshape that merges"),
        pytest.param(_sliced_and_merged, (10, 8), id="both"),
        pytest.param(_read_twice, (2, 6, 8), id="control: read whole too"),
        pytest.param(_summed_along, (2, 6, 8), id="control: rows depend on earlier ones"),
    ],
)
def test_the_product_is_computed_for_what_is_used(fn, shape):
    program = _normalize(fn)
    assert _find_shape(program) == shape
    new = program.jaxpr.replace(eqns=program.nodes)
    np.testing.assert_allclose(jax.core.eval_jaxpr(new, [], X, W)[0], fn(X, W).sum(), rtol=1e-5)


def test_values_that_are_not_large_stay_as_they_are():
    program = normalize(jax.make_jaxpr(_sliced)(X, W))  # the result is as large
    assert _find_shape(program) == (2, 6, 8)


def test_constants_of_inlined_calls_keep_their_values():
    table = np.arange(8.0, dtype=np.float32)
    fn = jax.jit(lambda x, w: jnp.exp(x @ w) * table)
    program = _normalize(fn)
    assert all(node.primitive.name != "jit" for node in program.nodes)
    results = run_program(program, [X, W], Tile(4))
    np.testing.assert_allclose(results[0], fn(X, W).sum(), rtol=1e-5)


def test_calls_are_inlined_with_their_scopes():
    def fn(x, w):
        with jax.named_scope("outer"):
            return jax.jit(lambda x: jnp.sin(x @ w))(x)

    program = _normalize(fn)
    assert all(node.primitive.name not in ("jit", "pjit") for node in program.nodes)
    inside = [node for node in program.nodes if node.primitive.name in ("dot_general", "sin")]
    assert len(inside) == 2
    assert all("outer" in str(node.source_info.name_stack) for node in inside)
    assert jaxprs.open_jaxpr(program.jaxpr) is program.jaxpr
