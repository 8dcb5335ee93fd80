# SPDX-License-Identifier: Apache-2.0
"""A run of three steps, and one that plain Orbax wrote."""

import warnings

import jax.numpy as jnp
import pytest
from orbax.checkpoint import v1

import ckpttools as ct
from tests.ckpttools.cli.commands import spec_for, state_at


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "run"
    with ct.open(spec_for(folder)) as ckpt:
        for step in (10, 20, 30):
            ckpt.save(step, state_at(step), metrics={"val_loss": 1 / step if step < 30 else float("nan")})
    return folder


@pytest.fixture
def foreign(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        v1.save_checkpointables(
            tmp_path / "plain" / "3", {"model": {"a": jnp.ones((2, 3), jnp.bfloat16)}, "x": {"e": 4}}
        )
    return tmp_path / "plain"
