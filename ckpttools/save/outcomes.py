# SPDX-License-Identifier: Apache-2.0
"""The outcome of a call to `step` or `save`: one of four frozen values, for a `match` statement.

Each step that reaches the disk is reported once: as the `Saved` that the waiting call or `wait` returns, or as
`finished` of a later outcome.
"""

import dataclasses
import pathlib

from ..errors import CheckpointError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Saved:
    """The step is on the disk, synced and committed.

    Attributes:
        step: Completed updates.
        path: Directory of the step.
        total_bytes: Bytes of its files.
        seconds: Seconds from the call to the commit.
        stall_s: Seconds that the training was stalled by it.
        reason: Why it was saved, such as "every 500 steps".
        deleted: Steps that retention deleted after it.
        trouble: What could not be deleted or copied after the commit, which is also a warning; "" if nothing.
        finished: An earlier background save that has ended since the last call; None if there is none.

    Example:
        >>> import tempfile
        >>> import ckpttools as ct
        >>> spec = ct.CheckpointSpec(directory=tempfile.mkdtemp(), storage=ct.Storage(asynchronous=False))
        >>> with ct.open(spec) as ckpt:
        ...     match ckpt.save(1, {"count": 1}):
        ...         case ct.Saved(step=step, reason=reason):
        ...             print(step, reason)
        1 asked for
    """

    step: int
    path: pathlib.Path
    total_bytes: int
    seconds: float
    stall_s: float
    reason: str
    deleted: tuple[int, ...] = ()
    trouble: str = ""
    finished: "Saved | None" = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Started:
    """A save is in progress in the background; the next call reports its end and raises its error.

    Attributes:
        step: Completed updates.
        reason: Why it is saved.
        stall_s: Seconds that the call took.
        finished: An earlier background save that has ended since the last call; None if there is none.

    Example:
        >>> import tempfile
        >>> import ckpttools as ct
        >>> with ct.open(ct.CheckpointSpec(directory=tempfile.mkdtemp())) as ckpt:
        ...     isinstance(ckpt.save(1, {"count": 1}), ct.Started), ckpt.wait().step
        (True, 1)
    """

    step: int
    reason: str
    stall_s: float
    finished: Saved | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Skipped:
    """Nothing was saved at this step.

    Attributes:
        step: Completed updates.
        reason: Why not.
        finished: An earlier background save that has ended since the last call; None if there is none.

    Example:
        >>> import tempfile
        >>> import ckpttools as ct
        >>> with ct.open(ct.CheckpointSpec(directory=tempfile.mkdtemp(), save=ct.EverySteps(500))) as ckpt:
        ...     ckpt.step(1, {"count": 1})
        Skipped(step=1, reason='not due: every 500 steps', finished=None)
    """

    step: int
    reason: str
    finished: Saved | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Failed:
    """A save failed, with `on_error="return"`; committed steps are as they were.

    Attributes:
        step: The step of the call; the error says which save failed.
        error: What would have been raised.
        finished: An earlier background save that has ended since the last call; None if there is none.

    Example:
        >>> import tempfile
        >>> import ckpttools as ct
        >>> with ct.open(ct.CheckpointSpec(directory=tempfile.mkdtemp())) as ckpt:
        ...     ckpt.save(-1, {"count": 1}, on_error="return").error.what
        'step -1 is not a count of completed updates.'
    """

    step: int
    error: CheckpointError
    finished: Saved | None = None


type Outcome = Saved | Started | Skipped | Failed
"""What a call to `Session.step` or `Session.save` returns."""
