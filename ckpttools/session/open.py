# SPDX-License-Identifier: Apache-2.0
"""`ct.open`: the function that opens a run."""

from ..restore.validation import Validate
from ..spec.spec import CheckpointSpec
from .session import Session


def open(spec: CheckpointSpec, validate: Validate | None = None) -> Session:
    """Open a run for saving and restoring; creates its directory and checks that it can be written.

    Args:
        spec: When to save, what to keep, where.
        validate: Given a copy of the state, returns arrays such as the logits of a fixed batch. They are stored with
            every step; a step whose restored copy computes other values, or NaN, is rejected.

    Returns:
        The run, for a `with` statement.

    Raises:
        NotARunError: If the directory is a step, lies inside one, or holds another writer's run that was not adopted.
        StorageError: If the directory cannot be written.
        SpecError: If `spec` is not a `CheckpointSpec`, or cannot be followed here, such as a mirror inside the run's
            directory.

    Example:
        >>> import tempfile
        >>> import numpy as np
        >>> import ckpttools as ct
        >>> spec = ct.CheckpointSpec(directory=tempfile.mkdtemp(), save=ct.EverySteps(2))
        >>> with ct.open(spec) as ckpt:
        ...     report = ckpt.restore({"params": np.zeros(2)})
        ...     for step in ckpt.steps(4):
        ...         outcome = ckpt.step(step, {"params": np.full(2, step)})
        ...     print(ckpt.all_steps())
        (2, 4)
    """
    return Session(spec, validate)
