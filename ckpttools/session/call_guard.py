# SPDX-License-Identifier: Apache-2.0
"""One call at a time into a session: nested calls, concurrent threads and forked processes."""

import os
import threading
from types import TracebackType

from ..errors import RunInUseError, SaveTimeoutError, StepOrderError


class CallGuard:
    """Let one call at a time into a session; used in a `with` statement.

    Two saves at once would share the buffers for copies, so that one would be hashed with arrays of the other.

    Args:
        timeout_s: How long a call waits for one of another thread.
    """

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._process_id = os.getpid()
        # Reentrant, so that a nested call is refused below instead of blocking until the timeout. A signal may arrive
        # after the lock is acquired and before the count is raised; a call made there comes first and is harmless.
        self._lock = threading.RLock()
        self._call_count = 0

    def __enter__(self) -> None:
        if os.getpid() != self._process_id:
            raise RunInUseError(
                what=f"this process was forked from process {self._process_id}, which has the run open.",
                why="both would write the same steps, and the threads that save do not exist in this process.",
                fix="save in the process that opened the run, or open it after the fork.",
            )
        if not self._lock.acquire(timeout=self._timeout_s):
            raise SaveTimeoutError(
                what=f"another thread has kept this session busy for {self._timeout_s:g} s.",
                why="a session makes one call at a time.",
                fix="check the disk; Storage(timeout_s=...) sets how long to wait.",
            )
        if self._call_count:
            self._lock.release()
            raise StepOrderError(
                what="a call of this session was made in the middle of another one.",
                why="a signal handler or a callback interrupted a save, whose arrays are half copied.",
                fix="set a flag in the handler, and call ckpt.save_now() from the training loop.",
            )
        self._call_count += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._call_count -= 1
        self._lock.release()
