# SPDX-License-Identifier: Apache-2.0
"""What a call to `step` or `save` came to: one of four frozen values, to be matched."""

import dataclasses
import pathlib

from ..errors import CheckpointError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Saved:
    """A step that is on the disk, synced and committed.

    Attributes:
        step: Completed updates.
        path: Folder of the step.
        total_bytes: Bytes of its files.
        seconds: From the call to the commit.
        stall_s: How long the training stood still for it.
        reason: Why it was saved.
        deleted: Steps that retention deleted after it.
        trouble: What could not be tidied up after the commit, which is given as a warning, too; "" if all could.
    """

    step: int
    path: pathlib.Path
    total_bytes: int
    seconds: float
    stall_s: float
    reason: str
    deleted: tuple[int, ...] = ()
    trouble: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Started:
    """A save that goes on in the background; the next call reports its end and raises its error.

    Attributes:
        step: Completed updates.
        reason: Why it is saved.
        stall_s: How long the call took.
        finished: An earlier background save that has ended since the last call.
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
        finished: An earlier background save that has ended since the last call.
    """

    step: int
    reason: str
    finished: Saved | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Failed:
    """A save that failed, with `on_error="return"`; committed steps are as they were.

    Attributes:
        step: The step of the call; the error says which save failed.
        error: What would have been raised.
    """

    step: int
    error: CheckpointError


type Outcome = Saved | Started | Skipped | Failed
