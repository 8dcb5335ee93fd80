# SPDX-License-Identifier: Apache-2.0
"""Decorate your own model in three ways, and compare the memory of a training step.

python examples/decorate_your_model.py
"""

import jax
import jax.numpy as jnp
from flax import nnx

import remattools as rt


class Block(nnx.Module):
    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.up = nnx.Linear(width, 4 * width, rngs=rngs)
        self.down = nnx.Linear(4 * width, width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return x + self.down(nnx.gelu(self.up(self.norm(x))))


@rt.remat(policy="nothing_saveable")
class RematBlock(Block):
    """Every instance is a region: only its input is saved for the backward pass."""


class Model(nnx.Module):
    def __init__(self, block: type[Block] = Block, *, depth: int = 8, width: int = 64, rngs: nnx.Rngs):
        self.layers = nnx.List(block(width, rngs=rngs) for _ in range(depth))
        self.head = nnx.Linear(width, 1, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


@rt.remat(every_n=2)
class EverySecond(Model):
    """Every second module of each sequence is a region: here of `layers`."""


@rt.remat(rules={"layers.*": rt.Remat(save=("up",))})
class SavesUp(Model):
    """Rules as in a file, written at the class: the widest product is saved, the rest is recomputed."""


def loss(model: Model, x: jax.Array) -> jax.Array:
    return jnp.mean(model(x) ** 2)


def main() -> None:
    x = jax.random.normal(jax.random.key(0), (512, 64))
    models = {
        "plain": Model(rngs=nnx.Rngs(0)),
        "a decorated block": Model(RematBlock, rngs=nnx.Rngs(0)),
        "every second layer": EverySecond(rngs=nnx.Rngs(0)),
        "rules on the class": SavesUp(rngs=nnx.Rngs(0)),
    }
    plain_loss, plain_gradients = nnx.jit(nnx.value_and_grad(loss))(models["plain"], x)
    for name, model in models.items():
        value, gradients = nnx.jit(nnx.value_and_grad(loss))(model, x)
        largest = max(
            float(jnp.abs(a - b).max() / jnp.abs(b).max())
            for a, b in zip(jax.tree.leaves(gradients), jax.tree.leaves(plain_gradients), strict=True)
        )
        assert jnp.allclose(value, plain_loss, rtol=1e-6)
        assert largest < 1e-4, name
        temp = rt.measure(loss, model, x, differentiate=True).temp_bytes
        print(f"{name:20} {temp / 1e6:6.2f} MB of temporaries, gradients within {largest:.0e} of the plain model's")


if __name__ == "__main__":
    main()
