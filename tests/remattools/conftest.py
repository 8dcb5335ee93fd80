# SPDX-License-Identifier: Apache-2.0
"""Skip the tests that need the TPU's compiler where it is not installed."""

import importlib.util

import pytest


@pytest.fixture
def tpu() -> str:
    """A target that needs libtpu."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip('libtpu is not installed: pip install "nnx-checkpointing[tpu]"')
    return "tpu:v5e:2x2"
