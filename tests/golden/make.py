# SPDX-License-Identifier: Apache-2.0
"""Writes the run of the present format: `python -m tests.golden.make /tmp/run`, then moved to `tests/golden/format-1`.

Run it once when a format is new, and never again for that format: what is there stands for what users have. Orbax
writes down the folder that it writes to, so let that be a plain one.
"""

import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np

import ckpttools as ct

STEPS = (1, 2)


class Batches:
    """An iterator with a nested state."""

    def __init__(self, at: int = 0) -> None:
        self.state = {"at": at, "order": np.arange(4)[::-1].copy(), "names": ("a", "ü"), "seed": 2**70}

    def get_state(self) -> dict:
        return self.state

    def set_state(self, state: dict) -> None:
        self.state = state


def make_state(step: int) -> dict:
    """Every kind of leaf; `step` 0 is a template."""
    return {
        "model": {
            "layers": [{"kernel": jnp.arange(6.0).reshape(2, 3) * step, "bias": jnp.full(3, step, jnp.bfloat16)}],
            "empty": jnp.zeros((0, 3)),
            "flags": np.array([True, False]),
            "f8": jnp.full(4, step, jnp.float8_e4m3fn),
        },
        "optimizer": {"count": jnp.array(step, jnp.int32), "mu": jnp.full((2, 3), 0.1 * step), "none": None},
        "rngs": {"key": jax.random.key(step), "raw": jax.random.PRNGKey(step)},
        "data": Batches(step),
        "values": {"epoch": step, "rate": 0.1 * step, "name": "run-ü", "blob": b"\x00\xff", "z": 1 + step * 1j},
    }


def make(folder: pathlib.Path) -> None:
    """A run of two steps, the second of a second version of the state."""
    surgery = ct.Rename("optimizer.momentum", "optimizer.mu")
    for step in STEPS:
        version = ct.StateVersion(step, [ct.Migration(1, surgery)] if step > 1 else [])
        spec = ct.CheckpointSpec(
            directory=folder,
            save=ct.OnImprovement("loss", mode="min"),
            storage=ct.Storage(asynchronous=False),
            state_version=version,
        )
        with ct.open(spec) as ckpt:
            ckpt.restore(make_state(0), surgery=[surgery] if step == 1 else [])
            ckpt.save(step, make_state(step), {"loss": 1.0 / step})
            if step == 1:
                ckpt.pin(1)
    (folder / ".ckpttools" / "lock").unlink()  # It names a process of this machine.


if __name__ == "__main__":
    make(pathlib.Path(sys.argv[1]))
