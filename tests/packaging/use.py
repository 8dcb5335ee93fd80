# SPDX-License-Identifier: Apache-2.0
"""Both halves, used once from an installed distribution; knows nothing of the checkout."""

import importlib.metadata
import pathlib
import sys
import sysconfig

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import ckpttools as ct
import remattools as rt

EXTRAS = ("libtpu", "matplotlib", "fsspec", "scipy.optimize")


class Block(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(8, 8, rngs=rngs)

    def __call__(self, x):
        return jnp.sin(jnp.sin(self.linear(x)))


class Model(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List(Block(rngs) for _ in range(4))

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def loss(model, x):
    return (model(x) ** 2).mean()


@nnx.jit
def update(model, optimizer, x):
    value, gradients = nnx.value_and_grad(loss)(model, x)
    optimizer.update(model, gradients)
    return value


def main() -> None:
    installed = pathlib.Path(sysconfig.get_paths()["purelib"])
    for package in (rt, ct):
        assert installed in pathlib.Path(str(package.__file__)).parents, package.__file__
    loaded = [name for name in EXTRAS if name in sys.modules]
    assert not loaded, f"imported without need: {loaded}"

    x = jnp.ones((16, 8))
    plain, model = Model(nnx.Rngs(0)), rt.apply(Model(nnx.Rngs(0)), {"layers.*": "nothing_saveable"})
    program = str(jax.make_jaxpr(lambda x: jax.grad(lambda x: loss(model, x))(x))(x))
    assert "checkpoint" in program or "remat" in program
    np.testing.assert_allclose(nnx.jit(loss)(model, x), nnx.jit(loss)(plain, x), rtol=1e-6)

    state = {"model": model, "optimizer": nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)}
    spec = ct.CheckpointSpec(directory="run", save=ct.EverySteps(2))
    with ct.open(spec) as ckpt:
        ckpt.restore(state)
        for step in ckpt.steps(4):
            update(model, state["optimizer"], x)
            ckpt.step(step, state)
    again = {"model": Model(nnx.Rngs(1))}
    with ct.open(spec) as ckpt:
        assert ckpt.restore(again).step == 4
    for ours, theirs in zip(jax.tree.leaves(nnx.state(model)), jax.tree.leaves(nnx.state(again["model"])), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    print(f"{importlib.metadata.version('nnx-checkpointing')} works, Python {sys.version.split()[0]}")


if __name__ == "__main__":
    main()
