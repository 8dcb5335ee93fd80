# SPDX-License-Identifier: Apache-2.0
"""Change the architecture in the middle of a run: a larger vocabulary, a renamed list, one more layer.

All other weights keep their trained values.

python examples/change_the_architecture.py
"""

import pathlib
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import ckpttools as ct


class Old(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Embed(100, 16, rngs=rngs)
        self.blocks = nnx.List(nnx.Linear(16, 16, rngs=rngs) for _ in range(2))

    def __call__(self, words: jax.Array) -> jax.Array:
        x = self.embed(words)
        for block in self.blocks:
            x = x + nnx.relu(block(x))
        return self.embed.attend(x)


class New(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Embed(120, 16, rngs=rngs)
        self.layers = nnx.List(nnx.Linear(16, 16, rngs=rngs) for _ in range(3))

    def __call__(self, words: jax.Array) -> jax.Array:
        x = self.embed(words)
        for layer in self.layers:
            x = x + nnx.relu(layer(x))
        return self.embed.attend(x)


SURGERY = [
    ct.Rename("blocks", "layers"),  # in the model and in the optimizer's moments
    ct.Pad("embedding"),  # the 20 new words keep the new model's values
    ct.Reinit("**.layers.2"),  # the new layer and its moments
]


def state_of(model: nnx.Module) -> dict:
    return {"model": model, "optimizer": nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)}


@nnx.jit
def update(model: nnx.Module, optimizer: nnx.Optimizer, words: jax.Array) -> jax.Array:
    def loss(model):
        return optax.softmax_cross_entropy_with_integer_labels(model(words), words).mean()

    value, gradients = nnx.value_and_grad(loss)(model)
    optimizer.update(model, gradients)
    return value


def train(spec: ct.CheckpointSpec, state: dict, total: int, surgery=()) -> ct.RestoreReport:
    words = jnp.arange(64).reshape(4, 16)
    with ct.open(spec) as ckpt:
        report = ckpt.restore(state, surgery=surgery)
        for step in ckpt.steps(total):
            loss = update(state["model"], state["optimizer"], words)
            ckpt.step(step, state, metrics={"loss": loss})
    print(f"restored {report.step}, trained to {total}: loss {float(loss):.3f}")
    return report


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        spec = ct.CheckpointSpec(directory=pathlib.Path(scratch, "run"), save=ct.EverySteps(20))
        old = state_of(Old(nnx.Rngs(0)))
        train(spec, old, 40)
        trained = np.asarray(old["model"].embed.embedding)

        new = state_of(New(nnx.Rngs(1)))
        try:
            train(spec, new, 80)
        except ct.StructureError as error:
            print(f"without surgery:\n{error}\n")
        print(ct.preview(spec.directory, new, surgery=SURGERY))

        fresh = state_of(New(nnx.Rngs(1)))
        ct.load(spec.directory, fresh, surgery=SURGERY)
        np.testing.assert_array_equal(fresh["model"].embed.embedding[:100], trained)
        train(spec, new, 80, SURGERY)
        assert ct.verify(spec.directory).ok


if __name__ == "__main__":
    main()
