# SPDX-License-Identifier: Apache-2.0
"""Restoring: what is filled, and from which step the run continues."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import ckpttools as ct
from tests.ckpttools.behaviour.examples import Net, leaves, make_state

from .runs import spec_for, train


def test_a_functional_loop_restores_the_same_bits(tmp_path):
    state, _ = train(spec_for(tmp_path), 2)
    fresh = make_state(7)
    graphdef, split = nnx.split(fresh["model"])
    before = leaves({"model": split})
    with ct.open(spec_for(tmp_path)) as ckpt:
        report = ckpt.restore({"model": split})
    assert leaves(report.state) == leaves({"model": state["model"]})
    assert leaves({"model": split}) == before, "the state passed in must stay as it was"
    assert isinstance(nnx.merge(graphdef, report.state["model"]), Net)


def test_an_abstract_template_is_filled(tmp_path):
    state, _ = train(spec_for(tmp_path), 2)
    abstract = nnx.eval_shape(lambda: Net(nnx.Rngs(0)))
    with ct.open(spec_for(tmp_path)) as ckpt:
        ckpt.restore({"model": abstract})
    assert leaves({"model": abstract}) == leaves({"model": state["model"]})


def test_an_empty_directory_restores_nothing_and_says_so(tmp_path):
    state = make_state()
    before = leaves(state)
    with ct.open(spec_for(tmp_path)) as ckpt:
        report = ckpt.restore(state)
        assert next(ckpt.steps(2)) == 1
    assert report.step is None
    assert str(report) == "nothing to restore"
    assert leaves(state) == before


@pytest.mark.parametrize("step", [np.int64(1), jnp.int32(1), True, "1", "lates", None, 1.0], ids=repr)
def test_an_invalid_selector_does_not_restore_the_latest_step(tmp_path, step):
    state = {"w": np.arange(3.0)}
    with ct.open(spec_for(tmp_path)) as ckpt:
        ckpt.save(1, state)
        ckpt.save(2, state)
        ckpt.wait()
        with pytest.raises(ct.SpecError, match="does not select a step"):
            ckpt.restore(state, step=step)
