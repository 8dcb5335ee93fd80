# SPDX-License-Identifier: Apache-2.0
"""A run of three steps, as the tests of restoring use it."""

from tests.ckpttools.restore.test_first_intact import run as run
