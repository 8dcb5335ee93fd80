# SPDX-License-Identifier: Apache-2.0
"""A small run with everything that is hard to restore, shared by the tests so that it is compiled once."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from ckpttools.tree import flatten


class Net(nnx.Module):
    """Dropout (random state), batch norm (running averages), a list, a dict of ints, a raw array."""

    def __init__(self, rngs: nnx.Rngs, width: int = 8) -> None:
        self.layers = nnx.List([nnx.Linear(width, width, rngs=rngs) for _ in range(2)])
        self.norm = nnx.BatchNorm(width, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.table = nnx.data(jnp.arange(3.0))
        self.extra = nnx.Variable({"scale": jnp.ones(2), "count": 3})

    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in self.layers:
            x = self.drop(nnx.relu(layer(x)))
        return self.norm(x)


class Batches:
    """A shuffled data iterator whose buffer is empty before its first batch."""

    def __init__(self, seed: int = 0, width: int = 8) -> None:
        self._rng = np.random.default_rng(seed)
        self._order: np.ndarray | None = None
        self._width, self._next = width, 0

    def __next__(self) -> np.ndarray:
        if self._order is None or self._next == len(self._order):
            self._order, self._next = self._rng.permutation(5), 0
        self._next += 1
        return np.full((4, self._width), self._order[self._next - 1], np.float32) + np.arange(4)[:, None]

    def get_state(self) -> dict:
        return {"rng": self._rng.bit_generator.state, "order": self._order, "next": self._next}

    def set_state(self, state: dict) -> None:
        self._rng.bit_generator.state = state["rng"]
        self._order, self._next = state["order"], state["next"]


def make_state(seed: int = 0) -> dict:
    """Model, optimizer (a chain with an empty and a masked part), random streams, data."""
    model = Net(nnx.Rngs(seed, dropout=seed + 1))
    transform = optax.chain(
        optax.clip(1.0), optax.masked(optax.adamw(1e-2), lambda params: jax.tree.map(lambda _: True, params))
    )
    return {
        "model": model,
        "optimizer": nnx.Optimizer(model, transform, wrt=nnx.Param),
        "rngs": nnx.Rngs(seed + 2),
        "data": Batches(seed),
    }


@nnx.jit
def _update(model: Net, optimizer: nnx.Optimizer, x: jax.Array) -> jax.Array:
    loss, grads = nnx.value_and_grad(lambda net: jnp.mean((net(x) - 1.0) ** 2))(model)
    optimizer.update(model, grads)
    return loss


def train_step(state: dict) -> float:
    """Make one update in place; return the loss."""
    noise = jax.random.normal(state["rngs"](), (4, 8)) * 1e-3
    return float(_update(state["model"], state["optimizer"], jnp.asarray(next(state["data"])) + noise))


def leaves(state: dict) -> dict[str, object]:
    """Return every leaf by name, arrays as (dtype, shape, bytes), so that equal means equal bits."""
    found = {}
    for item, value in state.items():
        for leaf in flatten.flatten_item(value).leaves:
            found[".".join([item, *map(str, leaf.path)])] = _bits(leaf.value)
    return found


def _bits(value: object) -> object:
    if isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        return str(value.dtype), value.shape, np.asarray(jax.random.key_data(value)).tobytes()
    if isinstance(value, jax.Array | np.ndarray | np.generic):
        return str(value.dtype), value.shape, np.asarray(value).tobytes()
    return type(value).__name__, value
