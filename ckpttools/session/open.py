# SPDX-License-Identifier: Apache-2.0
"""`ct.open`: the function that opens a run."""

from collections.abc import Iterable

from ..restore.validation import Validate
from ..spec.spec import CheckpointSpec
from .session import Session
from .signals import DEFAULT_SIGNALS


def open(
    spec: CheckpointSpec,
    validate: Validate | None = None,
    *,
    signals: Iterable[str | int] = DEFAULT_SIGNALS,
    save_on_exception: bool = False,
) -> Session:
    """Open a run for saving and restoring; creates its directory and checks that it can be written.

    Args:
        spec: When to save, what to keep, where.
        validate: Given a copy of the state, returns arrays such as the logits of a fixed batch. They are stored with
            every step; a step whose restored copy computes other values, or NaN, is rejected.
        signals: Names or numbers of the signals on which the run saves the current step and ends the loop. Add
            "SIGUSR1" for Slurm's `--signal=USR1@120`. With () no handler is installed; `Session.request_stop` does the
            same without a signal.
        save_on_exception: Whether to save the last completed step when an exception leaves the `with` block, if its
            state has not changed since. The state last passed to `step` stays alive until the next call.

    Returns:
        The run, for a `with` statement.

    Raises:
        NotARunError: If the directory is a step, is inside one, contains other runs, or contains another program's
            checkpoints that were not adopted.
        StorageError: If the directory cannot be written.
        SpecError: If `spec` is not a `CheckpointSpec`, or cannot be honoured, such as a mirror inside the run's
            directory, or a signal does not exist.

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
    return Session(spec, validate, signals=signals, save_on_exception=save_on_exception)
