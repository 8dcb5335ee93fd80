# SPDX-License-Identifier: Apache-2.0
"""Step numbers: counts of completed updates that only grow."""

import jax.numpy as jnp
import numpy as np
import pytest

import ckpttools as ct

from .runs import spec_for


def test_steps_only_grow(tmp_path):
    params = {"params": jnp.ones(2)}
    with ct.open(spec_for(tmp_path)) as ckpt:
        ckpt.save(4, params)
        assert isinstance(ckpt.save(4, params), ct.Skipped)
        with pytest.raises(ct.StepOrderError, match="after step 4"):
            ckpt.step(3, params)
        with pytest.raises(ct.StepOrderError):
            ckpt.steps(-1)


@pytest.mark.parametrize("step", [0, -4, 2.0, np.int64(3), True])
def test_an_invalid_step_number_says_how_to_count(tmp_path, step):
    with ct.open(spec_for(tmp_path)) as ckpt, pytest.raises(ct.StepOrderError, match=r"ckpt\.steps\(total\)"):
        ckpt.step(step, {"x": jnp.ones(3)})


def test_a_step_number_too_long_for_a_directory_is_refused(tmp_path):
    with ct.open(spec_for(tmp_path)) as ckpt:
        with pytest.raises(ct.StepOrderError, match="18 digits"):
            ckpt.save(10**18, {"w": np.ones(2)})
        ckpt.save(10**18 - 1, {"w": np.ones(2)})
        ckpt.wait()
        assert ckpt.latest_step() == 10**18 - 1
