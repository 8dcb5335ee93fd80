# SPDX-License-Identifier: Apache-2.0
"""One save in a separate thread, whose result or error is fetched once.

The caller may be interrupted at any bytecode: a signal handler may raise inside any function of this module or of the
standard library's Python code. That leaves the locks of `threading.Event` held and, before Python 3.13, marks a running
thread as ended. So each decision is a value that exactly one of caller and thread can set (`dict.setdefault`, one C
call); the only lock wakes the caller up and is never needed for the outcome.

-   Whether the save runs: the thread claims it when it begins. A caller that was interrupted while it started the
    thread may claim it instead; then the save never runs.
-   Whether it may commit: a save of live arrays asks once everything is written, and commits only if its caller still
    waits and agrees. After an interrupt the caller no longer waits, and its arrays may have changed.
"""

import _thread
import collections
import time
from collections.abc import Callable
from typing import Literal

from ..errors import SaveTimeoutError
from .outcomes import Saved

_POLL_S = 0.1
"""How long a lost wake-up can delay a wait, in seconds."""

type _Answer = Literal["yes", "no"]


class Worker:
    """A save in progress, from `start` on.

    Args:
        step: The step that is being saved.
        run: Makes the save; called in the thread, with this worker.
        asks_before_commit: Whether the save reads live arrays, so that it may be committed only while its caller waits.
            A save of copies may always be committed.
        timeout_s: How long to wait for the caller's answer, in seconds; without an answer the save is not committed.

    Attributes:
        step: The step that is being saved.
        stall_s: Seconds that the training was stalled by it.
    """

    def __init__(
        self,
        step: int,
        run: Callable[["Worker"], Saved],
        *,
        asks_before_commit: bool = False,
        timeout_s: float = 600.0,
    ) -> None:
        self.step = step
        self.stall_s = 0.0
        self._run_save = run
        self._timeout_s = timeout_s
        self._owner: dict[str, Literal["thread", "caller"]] = {}
        self._answer: dict[str, _Answer] = {} if asks_before_commit else {"may_commit": "yes"}
        self._result: Saved | None = None
        self._error: BaseException | None = None
        self._callbacks: collections.deque[Callable[[], None]] = collections.deque()
        self._is_done = False
        self._has_started = False
        self._is_asking = False
        self._wake_up = _thread.allocate_lock()
        self._wake_up.acquire()

    def start(self) -> None:
        """Start the thread; it is a daemon, so a disk that does not answer cannot keep the process alive."""
        _thread.start_new_thread(self._run, ())
        self._has_started = True

    def _run(self) -> None:
        if self._owner.setdefault("runs", "thread") == "thread":
            try:
                self._result = self._run_save(self)
            except BaseException as error:
                self._error = error
            self._is_done = True
            self._notify()
            self._call_back()

    def add_done_callback(self, callback: Callable[[], None]) -> None:
        """Call `callback` when the save has ended; at once if it has."""
        self._callbacks.append(callback)
        if self.has_ended:
            self._call_back()

    @property
    def has_ended(self) -> bool:
        """Whether the save has succeeded or failed, or was cancelled before it began."""
        return self._is_done or self.was_cancelled

    @property
    def was_cancelled(self) -> bool:
        """Whether the caller was interrupted while it started the thread, and the save never ran."""
        return self._owner.get("runs") == "caller"

    @property
    def was_left(self) -> bool:
        """Whether the save was not committed because its caller no longer waited."""
        return self._answer.get("may_commit") == "no"

    @property
    def error(self) -> BaseException | None:
        """The error of the save, not raised; None without one."""
        return self._error

    def may_commit(self) -> bool:
        """Return whether the save may be committed; called in its thread, once everything is written.

        Waits for the caller's answer if the save reads live arrays.
        """
        self._is_asking = True
        deadline = time.monotonic() + self._timeout_s
        while "may_commit" not in self._answer and time.monotonic() < deadline:
            self._notify()
            time.sleep(_POLL_S / 50)
        return self._answer.setdefault("may_commit", "no") == "yes"

    def leave(self) -> None:
        """Prevent the commit, unless it was already allowed: the caller no longer waits for the save."""
        self._answer.setdefault("may_commit", "no")

    def cancel(self) -> None:
        """Prevent the save if `start` was interrupted and its thread has not begun."""
        if not self._has_started:
            self._owner.setdefault("runs", "caller")

    def wait(self, timeout_s: float) -> None:
        """Wait until the save has ended, and let it commit meanwhile.

        Raises:
            SaveTimeoutError: If it has not after `timeout_s`.
        """
        self.cancel()
        deadline = time.monotonic() + timeout_s
        while not self.has_ended:
            if self._is_asking:
                self._answer.setdefault("may_commit", "yes")
            remaining_s = deadline - time.monotonic()
            if remaining_s <= 0:
                raise SaveTimeoutError(
                    what=f"the save of step {self.step} has not ended after {timeout_s:g} s.",
                    why="the disk is slow, full or gone; that step is not committed.",
                    fix="check the disk; Storage(timeout_s=...) sets how long to wait.",
                )
            self._wake_up.acquire(timeout=min(remaining_s, _POLL_S))

    def get_result(self) -> Saved | None:
        """Return the outcome of the save, or raise its error; None if it was cancelled."""
        if self._error is not None:
            raise self._error
        return self._result

    def _notify(self) -> None:
        """Wake up a waiting caller; called in the thread."""
        if self._wake_up.locked():
            self._wake_up.release()

    def _call_back(self) -> None:
        while self._callbacks:
            try:
                callback = self._callbacks.popleft()
            except IndexError:
                return
            callback()
