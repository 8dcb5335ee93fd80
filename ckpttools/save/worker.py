# SPDX-License-Identifier: Apache-2.0
"""One save in a thread of its own, whose result or error is fetched exactly once; and one call at a time."""

import threading
from collections.abc import Callable

from ..errors import SaveTimeoutError
from .outcomes import Saved


class Worker:
    """A save in progress.

    Attributes:
        step: The step that is being saved.
        stall_s: How long the training stood still for it.
        is_abandoned: Set when a wait timed out and the program went on, so that the arrays may change under the save.
    """

    def __init__(self, step: int, run: Callable[["Worker"], Saved]) -> None:
        self.step = step
        self.stall_s = 0.0
        self.is_abandoned = threading.Event()
        self._result: Saved | None = None
        self._error: BaseException | None = None
        self._callbacks: list[Callable[[], None]] = []
        self._is_done = False
        self._lock = threading.Lock()
        # A daemon: with a disk that does not answer, the process must still be able to end.
        self._thread = threading.Thread(target=self._run, args=(run,), name=f"ckpttools-save-{step}", daemon=True)
        self._thread.start()

    def _run(self, run: Callable[["Worker"], Saved]) -> None:
        try:
            self._result = run(self)
        except BaseException as error:
            self._error = error
        with self._lock:
            self._is_done = True
            calls = self._callbacks
        for call in calls:
            call()

    def add_done_callback(self, callback: Callable[[], None]) -> None:
        """Call when the save has come to its end; at once if it has."""
        with self._lock:
            if not self._is_done:
                self._callbacks.append(callback)
                return
        callback()

    @property
    def has_ended(self) -> bool:
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
        if not self.has_ended:
            raise SaveTimeoutError(
                what=f"the save of step {self.step} has not ended after {timeout_s:g} s.",
                why="the disk is slow, full or gone; that step is not committed.",
                fix="look at the disk; Storage(timeout_s=...) sets how long to wait.",
            )

    def get_result(self) -> Saved | None:
        """What the save came to; raises its error."""
        if self._error is not None:
            raise self._error
        return self._result
