# SPDX-License-Identifier: Apache-2.0
"""Random programs of the primitives that models consist of."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

LENGTHS = (2, 3, 4, 6)


def draw_program(seed, steps=6):
    """Return a function of no arguments that applies random operations to random arrays, each to earlier results.

    Integers of the program, such as indices and axes, are drawn once; its arrays are the same each time it runs.
    """
    rng = np.random.default_rng(seed)
    inputs = [_draw_array(rng, rng.integers(1, 4)) for _ in range(2)]
    plan = [(rng.choice(len(OPERATIONS)), int(rng.integers(2**31))) for _ in range(steps)]

    def run(*arrays):
        values = list(arrays)
        for number, seed_of_step in plan:
            of_step = np.random.default_rng(seed_of_step)
            # Recent values, so that a program is a chain with branches and not a set of single operations.
            value = values[-1 - int(of_step.integers(min(3, len(values))))]
            result = OPERATIONS[number](of_step, value)
            if result is not None and 0 < result.size <= 2000 and result.ndim <= 4:
                values.append(result)
        return values[len(arrays) :]

    return run, inputs


def _draw_array(rng, rank):
    return jnp.asarray(rng.normal(size=tuple(rng.choice(LENGTHS, rank))))


def _draw_axis(rng, value):
    return int(rng.integers(value.ndim)) if value.ndim else None


def _unary(rng, x):
    functions = (
        jnp.tanh,
        jnp.sin,
        lax.logistic,
        jnp.square,
        lambda x: x.astype(jnp.float32).astype(x.dtype),
        jnp.negative,
    )
    return functions[rng.integers(len(functions))](x)


def _binary(rng, x):
    shape = tuple(1 if rng.random() < 0.3 else length for length in x.shape)
    other = jnp.asarray(rng.normal(size=shape))
    functions = (jnp.add, jnp.multiply, jnp.subtract, lambda x, y: jnp.where(x > y, x, y), lambda x, y: x / (2 + y * y))
    return functions[rng.integers(len(functions))](x, other)


def _broadcast(rng, x):
    return jnp.broadcast_to(x, (int(rng.choice(LENGTHS)), *x.shape))


def _reshape(rng, x):
    if x.ndim >= 2 and rng.random() < 0.6:
        axis = int(rng.integers(x.ndim - 1))
        return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])
    axis = _draw_axis(rng, x)
    if axis is None or x.shape[axis] % 2:
        return None
    return x.reshape(*x.shape[:axis], *rng.permutation([2, x.shape[axis] // 2]).tolist(), *x.shape[axis + 1 :])


def _transpose(rng, x):
    return x.transpose(rng.permutation(x.ndim).tolist())


def _slice(rng, x):
    axis = _draw_axis(rng, x)
    return None if axis is None else lax.slice_in_dim(x, 0, x.shape[axis] - 1, axis=axis)


def _dynamic_slice(rng, x):
    axis = _draw_axis(rng, x)
    start = jnp.asarray(rng.integers(4))
    return None if axis is None else lax.dynamic_slice_in_dim(x, start, max(1, x.shape[axis] // 2), axis)


def _update(rng, x):
    axis = _draw_axis(rng, x)
    return (
        None
        if axis is None
        else lax.dynamic_update_slice_in_dim(x, jnp.sin(x)[..., :1], int(rng.integers(3)), x.ndim - 1)
    )


def _pad(rng, x):
    return None if not x.ndim else lax.pad(x, 0.5, [(int(rng.integers(2)), int(rng.integers(2)), 0) for _ in x.shape])


def _concatenate(rng, x):
    axis = _draw_axis(rng, x)
    return None if axis is None else jnp.concatenate([x, jnp.cos(x)], axis)


def _reverse(rng, x):
    axis = _draw_axis(rng, x)
    return None if axis is None else jnp.flip(x, axis)


def _reduce(rng, x):
    axis = _draw_axis(rng, x)
    functions = (jnp.sum, jnp.max, jnp.min, jnp.mean, jax.nn.logsumexp, lambda x, axis: jnp.argmax(x, axis) * 0.5)
    return None if axis is None else functions[rng.integers(len(functions))](x, axis=axis)


def _sum_of_all(rng, x):
    return x.sum(tuple(rng.permutation(x.ndim)[: int(rng.integers(1, x.ndim + 1))].tolist())) if x.ndim else None


def _softmax(rng, x):
    axis = _draw_axis(rng, x)
    return None if axis is None else jax.nn.softmax(x, axis)


def _cumulative(rng, x):
    axis = _draw_axis(rng, x)
    functions = (lax.cumsum, lax.cummax, lax.cumprod, lambda x, axis: lax.sort(x, dimension=axis))
    return None if axis is None else functions[rng.integers(len(functions))](x, axis)


def _top_k(rng, x):
    return lax.top_k(x, 2)[0] if x.ndim else None


def _contract(rng, x):
    axis = _draw_axis(rng, x)
    if axis is None:
        return None
    free = int(rng.choice(LENGTHS))
    batch = [other for other in range(x.ndim) if other != axis and rng.random() < 0.4]
    shape = [x.shape[other] for other in batch]
    other = jnp.asarray(rng.normal(size=(*shape, free, x.shape[axis])))
    numbers = (((axis,), (len(batch) + 1,)), (tuple(batch), tuple(range(len(batch)))))
    return lax.dot_general(x, other, numbers)


def _gram(rng, x):
    return jnp.einsum("...ij,...kj->...ik", x, x) if x.ndim >= 2 else None


def _gather(rng, x):
    axis = _draw_axis(rng, x)
    if axis is None:
        return None
    return jnp.take(x, jnp.asarray(rng.integers(x.shape[axis], size=(int(rng.choice(LENGTHS)),))), axis=axis)


def _gather_rows(rng, x):
    if x.ndim < 2:
        return None
    return jnp.take_along_axis(x, jnp.asarray(rng.integers(x.shape[-1], size=(*x.shape[:-1], 2))), axis=-1)


def _scatter(rng, x):
    if not x.ndim:
        return None
    places = jnp.asarray(rng.integers(x.shape[0], size=(3,)))
    return x.at[places].add(jnp.asarray(rng.normal(size=(3, *x.shape[1:]))))


def _positions(rng, x):
    axis = _draw_axis(rng, x)
    return None if axis is None else x * lax.broadcasted_iota(jnp.int32, x.shape, axis)


def _dropout(rng, x):
    key = jax.random.key(int(rng.integers(100)))
    return jnp.where(jax.random.bernoulli(key, 0.6, x.shape), x / 0.6, 0.0)


def _activation(rng, x):
    functions = (jax.nn.relu, jax.nn.softplus, jax.nn.silu, jax.nn.gelu, jax.nn.relu6)
    return functions[rng.integers(len(functions))](x)


def _convolve(rng, x):
    if x.ndim != 3:
        return None
    kernel = jnp.asarray(rng.normal(size=(4, x.shape[1], 2)))
    return lax.conv_general_dilated(x, kernel, (1,), "SAME")


@jax.custom_vjp
def normalize(x, scale):
    """Divide rows by their length; the backward rule sums the gradient of the scale over all rows."""
    return x * lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-3) * scale


def _normalize_forward(x, scale):
    return normalize(x, scale), (x, lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-3), scale)


def _normalize_backward(residuals, g):
    x, inverse, scale = residuals
    inner = jnp.mean(g * scale * x, -1, keepdims=True)
    return (g * scale - x * inner * inverse**2) * inverse, jnp.sum(g * x * inverse, tuple(range(x.ndim - 1)))


normalize.defvjp(_normalize_forward, _normalize_backward)


def _normalize(rng, x):
    return normalize(x, jnp.asarray(rng.normal(size=x.shape[-1:]))) if x.ndim >= 2 else None


OPERATIONS = (
    _activation,
    _binary,
    _broadcast,
    _concatenate,
    _contract,
    _convolve,
    _cumulative,
    _dropout,
    _dynamic_slice,
    _gather,
    _gather_rows,
    _gram,
    _normalize,
    _pad,
    _positions,
    _reduce,
    _reshape,
    _reverse,
    _scatter,
    _slice,
    _softmax,
    _sum_of_all,
    _top_k,
    _transpose,
    _unary,
    _update,
)
