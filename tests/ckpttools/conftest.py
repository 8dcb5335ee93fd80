# SPDX-License-Identifier: Apache-2.0
"""A run that is copied instead of saved, for tests that need no JAX."""

import pathlib
import shutil

import pytest

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "format-1"


@pytest.fixture
def golden(tmp_path):
    """Return the directory of a run with the steps 1 (pinned) and 2, with many kinds of leaves."""
    return shutil.copytree(GOLDEN, tmp_path / "golden")
