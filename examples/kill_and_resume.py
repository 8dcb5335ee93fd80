# SPDX-License-Identifier: Apache-2.0
"""Kill a training with SIGKILL and resume it: it ends with the same bits as an uninterrupted run.

python examples/kill_and_resume.py
"""

import pathlib
import signal
import subprocess
import sys
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import ckpttools as ct

STEPS = 60


class Model(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.inner, self.dropout = nnx.Linear(16, 64, rngs=rngs), nnx.Dropout(0.2, rngs=rngs)
        self.outer = nnx.Linear(64, 1, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.outer(self.dropout(nnx.relu(self.inner(x))))


@nnx.jit
def update(model: Model, optimizer: nnx.Optimizer, x: jax.Array) -> jax.Array:
    loss, gradients = nnx.value_and_grad(lambda model: jnp.mean((model(x) - x[:, :1]) ** 2))(model)
    optimizer.update(model, gradients)
    return loss


def train(directory: pathlib.Path, *, verbose: bool = False) -> dict:
    """Resume the run in `directory`, train to the last step and return the state."""
    model = Model(nnx.Rngs(0))
    state = {"model": model, "optimizer": nnx.Optimizer(model, optax.adamw(1e-3), wrt=nnx.Param)}
    with ct.open(ct.CheckpointSpec(directory=directory, save=ct.EverySteps(3), keep=ct.Latest(2))) as ckpt:
        print(f"restored: {ckpt.restore(state).step}", flush=True)
        for step in ckpt.steps(STEPS):
            # The batch is a function of the step, so a resumed run sees the same batches.
            update(model, state["optimizer"], jax.random.normal(jax.random.key(step), (32, 16)))
            ckpt.step(step, state)
            if verbose:
                print(f"step {step}", flush=True)
    return state


def train_and_kill(directory: pathlib.Path, step: int) -> None:
    """Train in a child process and kill it when it reports `step`, whatever it is doing."""
    command = [sys.executable, __file__, "--train", str(directory)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        for line in child.stdout:
            if line.startswith("restored"):
                print(f"  {line.strip()}")
            if line.startswith(f"step {step}\n"):
                child.send_signal(signal.SIGKILL)
    print(f"  killed after step {step}: exit status {child.returncode}")


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        directory = pathlib.Path(scratch, "killed")
        for step in (20, 41):
            train_and_kill(directory, step)
        resumed = train(directory)
        uninterrupted = train(pathlib.Path(scratch, "uninterrupted"))
    pairs = zip(jax.tree.leaves(nnx.state(resumed)), jax.tree.leaves(nnx.state(uninterrupted)), strict=True)
    for actual, expected in pairs:
        np.testing.assert_array_equal(_get_bits(actual), _get_bits(expected))
    print("resumed bit for bit: yes")


def _get_bits(leaf: jax.Array) -> np.ndarray:
    return np.asarray(jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--train"]:
        train(pathlib.Path(sys.argv[2]), verbose=True)
    else:
        main()
