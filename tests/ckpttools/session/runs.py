# SPDX-License-Identifier: Apache-2.0
"""A run of a few steps, for the tests of a session."""

import ckpttools as ct
from tests.ckpttools.behaviour.examples import make_state, train_step


def spec_for(directory, **changes):
    return ct.CheckpointSpec(directory=directory, **{"save": ct.EverySteps(2), "keep": ct.Latest(3), **changes})


def train(spec, total, *, seed=0):
    """Train to `total` as a new process would; return the state and the outcomes."""
    state, outcomes = make_state(seed), []
    with ct.open(spec) as ckpt:
        ckpt.restore(state)
        for step in ckpt.steps(total):
            loss = train_step(state)
            outcomes.append(ckpt.step(step, state, metrics={"loss": loss}))
    return state, outcomes
