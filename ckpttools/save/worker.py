# SPDX-License-Identifier: Apache-2.0
"""One save in a separate thread, whose result or error is fetched once."""

import threading
from collections.abc import Callable

from ..errors import SaveTimeoutError
from .outcomes import Saved


class Worker:
    """A save in progress.

    Args:
        step: The step that is being saved.
        run: Makes the save; called in the thread, with this worker.

    Attributes:
        step: The step that is being saved.
        stall_s: Seconds that the training was stalled by it.
        is_abandoned: Set when a wait has timed out and the program continues, so that the arrays may change.
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
        # A daemon, so that the process can end even if the disk does not answer.
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
        """Call `callback` when the save has ended; at once if it has."""
        with self._lock:
            if not self._is_done:
                self._callbacks.append(callback)
                return
        callback()

    @property
    def has_ended(self) -> bool:
        """Whether the save has succeeded or failed."""
        return not self._thread.is_alive()

    @property
    def error(self) -> BaseException | None:
        """What the save failed with, without raising it."""
        return self._error

    def wait(self, timeout_s: float) -> None:
        """Wait until the save has ended.

        Raises:
            SaveTimeoutError: If it has not after `timeout_s`.
        """
        self._thread.join(timeout_s)
        if not self.has_ended:
            raise SaveTimeoutError(
                what=f"the save of step {self.step} has not ended after {timeout_s:g} s.",
                why="the disk is slow, full or gone; that step is not committed.",
                fix="check the disk; Storage(timeout_s=...) sets how long to wait.",
            )

    def get_result(self) -> Saved | None:
        """Return the outcome of the save, or raise its error."""
        if self._error is not None:
            raise self._error
        return self._result
