# SPDX-License-Identifier: Apache-2.0
"""Pass a spec to a trainer that makes one update at a time and contains no checkpoint code.

python examples/trainer_with_a_spec.py --directory runs/trainer
"""

import argparse
import pathlib

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import ckpttools as ct


class Trainer:
    """A regression on synthetic data, with the four members that `ct.train` needs."""

    def __init__(self, total_steps: int):
        self.total_steps = total_steps
        self.model = nnx.Linear(8, 1, rngs=nnx.Rngs(0))
        self.optimizer = nnx.Optimizer(self.model, optax.adam(1e-2), wrt=nnx.Param)
        self.rngs = nnx.Rngs(1)

    def get_state(self) -> dict:
        return {"model": self.model, "optimizer": self.optimizer, "rngs": self.rngs}

    def set_state(self, state: dict) -> None:
        """Nothing to do: nnx objects are filled in place."""

    def train_step(self) -> dict:
        return {"loss": self._update(self.model, self.optimizer, self.rngs)}

    @staticmethod
    @nnx.jit
    def _update(model, optimizer, rngs):
        x = jax.random.normal(rngs(), (32, 8))

        def loss(model):
            return jnp.mean((model(x) - x.sum(axis=1, keepdims=True)) ** 2)

        value, gradients = nnx.value_and_grad(loss)(model)
        optimizer.update(model, gradients)
        return value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=pathlib.Path, default=pathlib.Path("runs/trainer"))
    parser.add_argument("--steps", type=int, default=200)
    args = parser.parse_args()

    spec = ct.CheckpointSpec(
        directory=args.directory,
        save=ct.EverySteps(50),
        keep=ct.Latest(2) | ct.Best("loss", mode="min"),
    )
    report = ct.train(Trainer(args.steps), spec)
    print(f"restored: {report.restored.step}, trained to {report.last_step}")
    print(ct.ls(args.directory))
    print("Run it again with more --steps: it resumes.")


if __name__ == "__main__":
    main()
