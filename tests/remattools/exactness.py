# SPDX-License-Identifier: Apache-2.0
"""What "the same" means: rounding against the plain model, equality for integers, counters and structure."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx


def assert_same_values(ours: Any, plain: Any) -> None:
    """Equal trees; floats within 1e-12 (float64) or 1e-4 (float32) of a leaf's scale.

    The scale of a leaf is the larger of its own largest value and the median of all leaves': some gradients are
    zero but for noise, such as a key's bias in attention.
    """
    assert jax.tree.structure(ours) == jax.tree.structure(plain)
    pairs = [(_array(a), _array(b)) for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(plain), strict=True)]
    floats = [b for _, b in pairs if jnp.issubdtype(b.dtype, jnp.inexact) and b.size]
    median = float(np.median([np.abs(b).max() for b in floats])) if floats else 0.0
    for a, b in pairs:
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        if not jnp.issubdtype(b.dtype, jnp.inexact):
            np.testing.assert_array_equal(a, b)
        elif b.size:
            scale = max(float(np.abs(b).max()), median, 1e-30)
            bound = 1e-12 if b.dtype in (np.float64, np.complex128) else 1e-4
            assert float(np.abs(a - b).max()) / scale <= bound


def _array(leaf: Any) -> np.ndarray:
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return np.asarray(jax.random.key_data(leaf))
    array = np.asarray(leaf)
    return array.astype(np.float32) if array.dtype == jnp.bfloat16 else array


def gradients(loss: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
    """Gradients of all parameters as a pure tree, under nnx.jit, like a train step."""

    @nnx.jit
    def step(module: Any, *inputs: Any) -> Any:
        value, grads = nnx.value_and_grad(lambda m: loss(m, *inputs, **kwargs))(module)
        return value, nnx.to_pure_dict(grads)

    return step(model, *args)


def temp_bytes(loss: Any, model: Any, *args: Any) -> int:
    """Temporaries of the compiled gradient, by the compiler's own count."""
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    def of_params(params: Any, rest: Any, *inputs: Any) -> Any:
        return loss(nnx.merge(graphdef, params, rest, copy=True), *inputs)

    compiled = jax.jit(jax.grad(of_params)).lower(params, rest, *args).compile()
    return int(compiled.memory_analysis().temp_size_in_bytes)


def assert_exact(loss: Any, plain: Any, ruled: Any, *args: Any, **kwargs: Any) -> None:
    """Loss, gradients, and the state left behind are those of the plain model."""
    assert_same_values(gradients(loss, ruled, *args, **kwargs), gradients(loss, plain, *args, **kwargs))
    assert_same_values(nnx.to_pure_dict(nnx.state(ruled)), nnx.to_pure_dict(nnx.state(plain)))
