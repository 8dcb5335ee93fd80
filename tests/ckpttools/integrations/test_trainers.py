# SPDX-License-Identifier: Apache-2.0
"""Trainers that take a spec: a plain flax loop, and a functional one."""

import os
import signal

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import ckpttools as ct
from tests.ckpttools.behaviour.examples import Batches, leaves


@nnx.jit
def train_step(model, optimizer, x):
    loss, grads = nnx.value_and_grad(lambda model: jnp.mean(model(x) ** 2))(model)
    optimizer.update(model, grads)
    return loss


def loop(total_steps, stop_after=None):
    model = nnx.Sequential(nnx.Linear(8, 4, rngs=nnx.Rngs(0)), nnx.Dropout(0.5, rngs=nnx.Rngs(1)))
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
    state = {"model": model, "optimizer": optimizer, "data": Batches()}

    def update(state):
        if update.left == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        update.left -= 1
        return {"loss": train_step(state["model"], state["optimizer"], next(state["data"]))}

    update.left = -1 if stop_after is None else stop_after
    return ct.FlaxLoop(state=state, update=update, total_steps=total_steps)


def spec_of(directory, **fields):
    return ct.CheckpointSpec(directory=directory, **{"save": ct.EverySteps(3), "keep": ct.All(), **fields})


def test_a_stopped_flax_loop_resumes_with_the_same_bits(tmp_path):
    unbroken = loop(8)
    assert isinstance(unbroken, ct.Trainer)
    assert ct.train(unbroken, spec_of(tmp_path / "one")).last_step == 8
    stopped = ct.train(loop(8, stop_after=4), spec_of(tmp_path / "two"))
    assert (stopped.last_step, stopped.preempted, stopped.restored.step) == (5, True, None)
    resumed = loop(8)
    report = ct.train(resumed, spec_of(tmp_path / "two"))
    assert (report.restored.step, report.last_step, report.preempted) == (5, 8, False)
    assert leaves(resumed.state) == leaves(unbroken.state)
    assert [step.step for step in ct.ls(tmp_path / "two")] == [3, 5, 6, 8]


def test_a_functional_loop(tmp_path):
    transform = optax.sgd(0.1)

    def update(state):
        grads = jax.grad(lambda w: jnp.sum(w**2))(state["params"]["w"])
        updates, state["optimizer"] = transform.update({"w": grads}, state["optimizer"])
        state["params"] = optax.apply_updates(state["params"], updates)

    def trainer(total_steps):
        params = {"w": jnp.arange(3.0)}
        return ct.FlaxLoop(
            state={"params": params, "optimizer": transform.init(params)}, update=update, total_steps=total_steps
        )

    unbroken, resumed = trainer(4), trainer(4)
    ct.train(unbroken, spec_of(tmp_path / "one"))
    ct.train(trainer(2), spec_of(tmp_path / "two"))
    assert ct.train(resumed, spec_of(tmp_path / "two")).restored.step == 2
    assert leaves(resumed.state) == leaves(unbroken.state)
