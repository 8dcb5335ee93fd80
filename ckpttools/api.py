# SPDX-License-Identifier: Apache-2.0
"""The verbs of the package: functions that are read as `ct.open(...)`, `ct.best(...)`."""

from typing import Literal

from .recovery import BestStep
from .session import Session
from .spec.spec import CheckpointSpec


def open(spec: CheckpointSpec) -> Session:
    """Open a run for saving and restoring; creates its folder and proves that it can be written.

    Raises:
        StorageError: If the folder cannot be written.
    """
    return Session(spec)


def best(metric: str, mode: Literal["min", "max"] | None = None) -> BestStep:
    """For `restore(step=...)`: the step with the best value of a metric; the spec knows the mode if it names it."""
    return BestStep(metric, mode)
