# SPDX-License-Identifier: Apache-2.0
"""The verbs of the package: functions that are read as `ct.open(...)`, `ct.best(...)`."""

from ..restore.validation import Validate
from ..spec.spec import CheckpointSpec
from .session import Session


def open(spec: CheckpointSpec, validate: Validate | None = None) -> Session:
    """Open a run for saving and restoring; creates its folder and proves that it can be written.

    Args:
        spec: When to save, what to keep, where.
        validate: Given a copy of the state, returns arrays such as the logits of a fixed batch. They are stored with
            every step; a step whose restored copy computes anything else, or NaN, is rejected.

    Raises:
        StorageError: If the folder cannot be written.
        SpecError: If it is no spec, or one that cannot be honoured here, such as a mirror inside the run's folder.
    """
    return Session(spec, validate)
