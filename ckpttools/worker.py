# SPDX-License-Identifier: Apache-2.0
"""One save in a thread of its own, whose result or error is fetched exactly once; and one call at a time."""

import os
import threading
from collections.abc import Callable
from types import TracebackType

from .errors import RunInUseError, SaveTimeoutError, StepOrderError
from .outcomes import Saved


class Worker:
    """A save in progress.

    Attributes:
        step: The step that is being saved.
        stall_s: How long the training stood still for it.
        abandoned: Set when a wait timed out and the program went on, so that the arrays may change under the save.
    """

    def __init__(self, step: int, run: Callable[["Worker"], Saved]) -> None:
        self.step = step
        self.stall_s = 0.0
        self.abandoned = threading.Event()
        self._result: Saved | None = None
        self._error: BaseException | None = None
        self._at_end: list[Callable[[], None]] = []
        self._done = False
        self._turn = threading.Lock()
        # A daemon: with a disk that does not answer, the process must still be able to end.
        self._thread = threading.Thread(target=self._work, args=(run,), name=f"ckpttools-save-{step}", daemon=True)
        self._thread.start()

    def _work(self, run: Callable[["Worker"], Saved]) -> None:
        try:
            self._result = run(self)
        except BaseException as error:
            self._error = error
        with self._turn:
            self._done = True
            calls = self._at_end
        for call in calls:
            call()

    def at_end(self, call: Callable[[], None]) -> None:
        """Call when the save has come to its end; at once if it has."""
        with self._turn:
            if not self._done:
                self._at_end.append(call)
                return
        call()

    @property
    def ended(self) -> bool:
        """Whether the save has come to its end, good or bad."""
        return not self._thread.is_alive()

    @property
    def error(self) -> BaseException | None:
        """What the save failed with, without raising it."""
        return self._error

    def wait(self, timeout_s: float) -> None:
        """Wait for the end.

        Raises:
            SaveTimeoutError: If it does not come in time.
        """
        self._thread.join(timeout_s)
        if not self.ended:
            raise SaveTimeoutError(
                what=f"the save of step {self.step} has not ended after {timeout_s:g} s.",
                why="the disk is slow, full or gone; that step is not committed.",
                fix="look at the disk; Storage(timeout_s=...) sets how long to wait.",
            )

    def result(self) -> Saved | None:
        """What the save came to; raises its error."""
        if self._error is not None:
            raise self._error
        return self._result


class Turn:
    """Lets one call at a time into a session; used in a `with` statement.

    Two saves at once would share the buffers for copies, and the one would be digested with arrays of the other in it.
    """

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._process = os.getpid()
        # A signal may come between taking the lock and taking note of it; such a call comes first, and is harmless.
        self._lock = threading.RLock()
        self._calls = 0

    def __enter__(self) -> None:
        if os.getpid() != self._process:
            raise RunInUseError(
                what=f"this process was forked from process {self._process}, which has the run open.",
                why="both would write the same steps; the threads that save do not exist here.",
                fix="save in the process that opened the run, or open it after the fork.",
            )
        if not self._lock.acquire(timeout=self._timeout_s):
            raise SaveTimeoutError(
                what=f"another thread has kept this session busy for {self._timeout_s:g} s.",
                why="a session does one thing at a time.",
                fix="look at the disk; Storage(timeout_s=...) sets how long to wait.",
            )
        if self._calls:
            self._lock.release()
            raise StepOrderError(
                what="a call of this session was made in the middle of another one.",
                why="a signal handler or a callback interrupted a save, whose arrays are half copied.",
                fix="set a flag in the handler, and call ckpt.save_now() from the training loop.",
            )
        self._calls += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._calls -= 1
        self._lock.release()
