# SPDX-License-Identifier: Apache-2.0
"""Allow one call at a time into a session: nested calls, concurrent threads and forked processes.

A call may be interrupted at any bytecode, even between acquiring a lock and releasing it. So nothing here has to be
released: a call is running while its frame is on the stack of its thread, and an interrupted call is recognised by the
absence of its frame.
"""

import os
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType

from ..errors import RunInUseError, SaveTimeoutError, StepOrderError

_POLL_S = 0.01


class Call:
    """One call into a session, from its beginning to its end."""

    def __init__(self) -> None:
        self.thread_id = threading.get_ident()
        self.has_ended = False
        self.successor: dict[str, Call] = {}
        """The call after this one, under the key "call"; the first assignment wins."""

    @property
    def is_running(self) -> bool:
        """Whether the call has neither returned nor been interrupted."""
        return not self.has_ended and self._is_on_stack()

    def _is_on_stack(self) -> bool:
        frame: FrameType | None = sys._current_frames().get(self.thread_id)
        while frame is not None:
            if frame.f_code is CallGuard.run.__code__ and frame.f_locals.get("call") is self:
                return True
            frame = frame.f_back
        return False


class CallGuard:
    """Let one call at a time into a session.

    Two concurrent saves would share the copy buffers, and one would digest the arrays of the other.

    Args:
        timeout_s: How long to wait for another thread, in seconds.
    """

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._process_id = os.getpid()
        self._last = Call()
        self._last.has_ended = True

    @property
    def current_call(self) -> Call | None:
        """The call that is running; None between calls."""
        last = self._find_last()
        return last if last.is_running else None

    @property
    def is_forked(self) -> bool:
        """Whether this process was forked from the one that opened the run."""
        return os.getpid() != self._process_id

    def run[T](self, action: Callable[[], T]) -> T:
        """Return what `action` returns, once no other call is running.

        Raises:
            RunInUseError: In a process that was forked from the one that opened the run.
            SaveTimeoutError: If another thread's call takes too long.
            StepOrderError: If this thread is in the middle of a call.
        """
        if self.is_forked:
            raise RunInUseError(
                what=f"this process was forked from process {self._process_id}, which has the run open.",
                why="both processes would write the same steps, and a fork does not copy the threads that save.",
                fix="save in the process that opened the run, or open it after the fork.",
            )
        call = Call()
        self._enter(call)
        try:
            return action()
        finally:
            call.has_ended = True

    def _find_last(self) -> Call:
        last = self._last
        while (successor := last.successor.get("call")) is not None:
            last = successor
        return last

    def _enter(self, call: Call) -> None:
        deadline = time.monotonic() + self._timeout_s
        while True:
            last = self._find_last()
            if last.is_running:
                self._require_other_thread(last)
                if time.monotonic() > deadline:
                    raise SaveTimeoutError(
                        what=f"another thread has kept this session busy for {self._timeout_s:g} s.",
                        why="a session handles one call at a time.",
                        fix="check the disk; Storage(timeout_s=...) sets how long to wait.",
                    )
                time.sleep(_POLL_S)
            elif last.successor.setdefault("call", call) is call:
                self._last = call
                return

    def _require_other_thread(self, call: Call) -> None:
        if call.thread_id == threading.get_ident():
            raise StepOrderError(
                what="this session was called during another of its calls in the same thread.",
                why="a signal handler or a callback interrupted a save, whose arrays are half copied.",
                fix="set a flag in the handler, and call ckpt.save_now() from the training loop.",
            )
