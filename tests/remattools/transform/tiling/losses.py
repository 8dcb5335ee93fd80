# SPDX-License-Identifier: Apache-2.0
"""Losses as people write them, from features, a head and labels to a scalar; none knows of tiling."""

import jax
import jax.numpy as jnp
import optax

VOCABULARY = 512


def _compute_nll(logits, labels):
    picked = jnp.take_along_axis(logits, labels[..., None], -1)[..., 0]
    return jax.nn.logsumexp(logits, -1) - picked


def logsumexp(w, x, y):
    return _compute_nll(x @ w, y).mean()


def with_optax(w, x, y):
    return optax.softmax_cross_entropy_with_integer_labels(x @ w, y).mean()


def one_hot(w, x, y):
    return -(jax.nn.one_hot(y, VOCABULARY) * jax.nn.log_softmax(x @ w)).sum(-1).mean()


def label_smoothing(w, x, y):
    targets = optax.smooth_labels(jax.nn.one_hot(y, VOCABULARY), 0.1)
    return optax.softmax_cross_entropy(x @ w, targets).mean()


def soft_targets(w, x, y):
    teacher = jax.nn.softmax(jnp.sin(jax.nn.one_hot(y, VOCABULARY) * 3))
    return (teacher * (jnp.log(teacher) - jax.nn.log_softmax(x @ w))).sum(-1).mean()


def masked_mean(w, x, y):
    mask = (y % 3 != 0).astype(x.dtype)
    return (_compute_nll(x @ w, y) * mask).sum() / jnp.maximum(mask.sum(), 1)


def z_loss(w, x, y):
    logits = x @ w
    return _compute_nll(logits, y).mean() + 1e-2 * (jax.nn.logsumexp(logits, -1) ** 2).mean()


def soft_capped(w, x, y):
    return _compute_nll(30 * jnp.tanh((x @ w) / 30), y).mean()


def shifted(w, x, y):
    return _compute_nll((x @ w)[:, :-1], y[:, 1:]).mean()


def shifted_and_merged(w, x, y):
    logits = (x @ w)[:, :-1].reshape(-1, VOCABULARY)
    return optax.softmax_cross_entropy_with_integer_labels(logits, y[:, 1:].reshape(-1)).mean()


def merged_first(w, x, y):
    return _compute_nll(x.reshape(-1, x.shape[-1]) @ w, y.reshape(-1)).mean()


def summed_at_once(w, x, y):
    return (jax.nn.one_hot(y, VOCABULARY) * jax.nn.log_softmax(x @ w)).sum() / -y.size


def with_accuracy(w, x, y):
    logits = x @ w
    return _compute_nll(logits, y).mean() + 0.1 * (logits.argmax(-1) == y).mean()


def clipped(w, x, y):
    return _compute_nll(jax.nn.relu6(jax.nn.relu(x @ w)), y).mean()


def odd_length(w, x, y):
    return _compute_nll(x[:, :61] @ w, y[:, :61]).mean()


def preference(w, x, y):
    """DPO: two sequences, their summed log probabilities, a logistic loss of the difference."""
    chosen = -_compute_nll(x @ w, y).sum(-1)
    rejected = -_compute_nll(jnp.cos(x) @ w, (y * 7) % VOCABULARY).sum(-1)
    return -jax.nn.log_sigmoid(0.1 * (chosen - rejected)).mean()


def policy_gradient(w, x, y):
    """GRPO: clipped ratios of probabilities, and the divergence from a reference."""
    new = -_compute_nll(x @ w, y)
    old = jax.lax.stop_gradient(-_compute_nll(x @ (w * 0.9), y))
    ratio = jnp.exp(new - old)
    advantage = jnp.sin(jnp.arange(x.shape[0]))[:, None]
    clipped_ratio = jnp.clip(ratio, 0.8, 1.2)
    divergence = jnp.exp(old - new) - (old - new) - 1
    return (-jnp.minimum(ratio * advantage, clipped_ratio * advantage) + 0.05 * divergence).mean()


@jax.custom_vjp
def _cross_entropy(logits, targets):
    shifted_logits = logits - logits.max(-1, keepdims=True)
    total = jnp.log(jnp.exp(shifted_logits).sum(-1, keepdims=True))
    return -(targets * (shifted_logits - total)).sum(-1)


def _forward(logits, targets):
    shifted_logits = logits - logits.max(-1, keepdims=True)
    exponentials = jnp.exp(shifted_logits)
    total = exponentials.sum(-1, keepdims=True)
    return -(targets * (shifted_logits - jnp.log(total))).sum(-1), (targets, exponentials, total)


def _backward(residuals, gradient):
    targets, exponentials, total = residuals
    return gradient[..., None] * (exponentials / total - targets), -gradient[..., None] * jnp.log(exponentials / total)


_cross_entropy.defvjp(_forward, _backward)


def custom_derivative(w, x, y):
    return _cross_entropy(x @ w, jax.nn.one_hot(y, VOCABULARY)).mean()


def centred(w, x, y):
    """A statistic over all rows in the middle: only a part can be in pieces."""
    logits = x @ w
    return _compute_nll(logits - logits.mean((0, 1)), y).mean()


CUT = (
    logsumexp,
    with_optax,
    one_hot,
    label_smoothing,
    soft_targets,
    masked_mean,
    z_loss,
    soft_capped,
    shifted,
    shifted_and_merged,
    merged_first,
    summed_at_once,
    with_accuracy,
    clipped,
    odd_length,
    preference,
    policy_gradient,
    custom_derivative,
)
