# SPDX-License-Identifier: Apache-2.0
"""Kill a training with SIGKILL and go on: the resumed run ends with the bits of one that nobody killed.

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


def train(folder: pathlib.Path, *, tell: bool = False) -> dict:
    """Train to the last step from wherever the folder's run is, and tell of each step; the state at the end."""
    model = Model(nnx.Rngs(0))
    state = {"model": model, "optimizer": nnx.Optimizer(model, optax.adamw(1e-3), wrt=nnx.Param)}
    with ct.open(ct.CheckpointSpec(directory=folder, save=ct.EverySteps(3), keep=ct.Latest(2))) as ckpt:
        print(f"restored: {ckpt.restore(state).step}", flush=True)
        for step in ckpt.steps(STEPS):
            # The batch is a function of the step, so a resumed run sees the ones that it would have seen.
            update(model, state["optimizer"], jax.random.normal(jax.random.key(step), (32, 16)))
            ckpt.step(step, state)
            if tell:
                print(f"step {step}", flush=True)
    return state


def killed_after(folder: pathlib.Path, step: int) -> None:
    """Train in a process of its own and kill it when it reports a step, whatever it is doing."""
    command = [sys.executable, __file__, "--train", str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        for line in child.stdout:
            if line.startswith("restored"):
                print(f"  {line.strip()}")
            if line.startswith(f"step {step}\n"):
                child.send_signal(signal.SIGKILL)
    print(f"  killed after step {step}: exit status {child.returncode}")


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = pathlib.Path(scratch, "killed")
        for step in (20, 41):
            killed_after(folder, step)
        resumed = train(folder)
        unbroken = train(pathlib.Path(scratch, "unbroken"))
    pairs = zip(jax.tree.leaves(nnx.state(resumed)), jax.tree.leaves(nnx.state(unbroken)), strict=True)
    for ours, theirs in pairs:
        np.testing.assert_array_equal(_bits(ours), _bits(theirs))
    print("resumed bit for bit: yes")


def _bits(leaf: jax.Array) -> np.ndarray:
    return np.asarray(jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--train"]:
        train(pathlib.Path(sys.argv[2]), tell=True)
    else:
        main()
