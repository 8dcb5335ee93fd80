# SPDX-License-Identifier: Apache-2.0
"""Train a character model with a rule file and checkpoints; run it again to resume.

    python examples/train_charlm.py                 # an nnx loop
    python examples/train_charlm.py --functional    # the same over nnx.split state

`charlm.toml` says what is recomputed and when the run is saved.
"""

import argparse
import dataclasses
import pathlib
import tomllib
from typing import Any

import jax
import numpy as np
import optax
from charlm_data import VOCAB, Windows, load_text
from charlm_model import CharLM
from flax import nnx
from rich.progress import Progress

import ckpttools as ct
import remattools as rt

CONFIG = pathlib.Path(__file__).with_name("charlm.toml")


def build(config: dict[str, Any]) -> tuple[CharLM, nnx.Optimizer, Windows]:
    """Create model, optimizer and data of a new run."""
    train, shape = config["train"], config["model"]
    model = CharLM(vocab=VOCAB, rngs=nnx.Rngs(train["seed"]), **shape)
    optimizer = nnx.Optimizer(model, optax.adamw(train["learning_rate"]), wrt=nnx.Param)
    data = Windows(load_text(), batch=train["batch"], seq=shape["seq"], seed=train["seed"])
    return model, optimizer, data


def loss_fn(model: CharLM, batch: jax.Array) -> jax.Array:
    """Return the mean cross-entropy in nats per character; `batch` has shape `(batch, seq + 1)`, int32."""
    logits = model(batch[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:]).mean()


def update(model: CharLM, optimizer: nnx.Optimizer, batch: jax.Array) -> jax.Array:
    """Run one training step in place and return the loss."""
    loss, grads = nnx.value_and_grad(loss_fn)(model, batch)
    optimizer.update(model, grads)
    return loss


def train(config_path: pathlib.Path, spec: ct.CheckpointSpec, progress: Progress) -> None:
    """Train nnx objects, which are restored and saved in place."""
    config = tomllib.loads(config_path.read_text())
    model, optimizer, data = build(config)
    rt.apply(model, rt.Rules.load(config_path))
    step_fn = nnx.jit(update)
    state = {"model": model, "optimizer": optimizer, "data": data}

    with ct.open(spec) as ckpt:
        report = ckpt.restore(state)
        task = progress.add_task("training", total=config["train"]["steps"], completed=report.step or 0)
        for step in ckpt.steps(config["train"]["steps"]):
            loss = step_fn(model, optimizer, next(data))
            ckpt.step(step, state, metrics={"loss": loss})
            progress.update(task, completed=step, description=f"loss {float(loss):.3f}")


def train_functional(config_path: pathlib.Path, spec: ct.CheckpointSpec, progress: Progress) -> None:
    """Train a pytree of state; the report has the restored pytree."""
    config = tomllib.loads(config_path.read_text())
    model, optimizer, data = build(config)
    rt.apply(model, rt.Rules.load(config_path))
    graphdef, pure = nnx.split((model, optimizer))

    @jax.jit
    def step_fn(pure: nnx.State, batch: jax.Array) -> tuple[nnx.State, jax.Array]:
        model, optimizer = nnx.merge(graphdef, pure, copy=True)
        loss = update(model, optimizer, batch)
        return nnx.state((model, optimizer)), loss

    with ct.open(spec) as ckpt:
        report = ckpt.restore({"train": pure, "data": data})
        pure = report.state["train"]
        task = progress.add_task("training", total=config["train"]["steps"], completed=report.step or 0)
        for step in ckpt.steps(config["train"]["steps"]):
            pure, loss = step_fn(pure, np.asarray(next(data)))
            ckpt.step(step, {"train": pure, "data": data}, metrics={"loss": loss})
            progress.update(task, completed=step, description=f"loss {float(loss):.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=pathlib.Path, default=CONFIG, help="TOML file of the run")
    parser.add_argument("--directory", type=pathlib.Path, help="where to save; default: as in the TOML file")
    parser.add_argument("--functional", action="store_true", help="loop over nnx.split state")
    arguments = parser.parse_args()
    spec = ct.CheckpointSpec.load(arguments.config)
    if arguments.directory is not None:
        spec = dataclasses.replace(spec, directory=arguments.directory)
    with Progress() as progress:
        (train_functional if arguments.functional else train)(arguments.config, spec, progress)


if __name__ == "__main__":
    main()
