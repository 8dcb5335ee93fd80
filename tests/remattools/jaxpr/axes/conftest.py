# SPDX-License-Identifier: Apache-2.0
"""Pieces are compared in float64."""

import jax
import pytest


@pytest.fixture(autouse=True)
def use_float64():
    with jax.enable_x64(True):
        yield
