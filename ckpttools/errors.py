# SPDX-License-Identifier: Apache-2.0
"""Errors of ckpttools, in the what/why/fix form that both packages share."""

from remattools.errors import Explained as Explained


class CheckpointError(Explained):
    """Base of every error that ckpttools raises on purpose."""


class SpecError(CheckpointError, ValueError):
    """A value of a `CheckpointSpec` that cannot be honoured."""
