# SPDX-License-Identifier: Apache-2.0
"""SIGTERM and SIGINT: save the current step and end the loop, instead of ending the process.

What happens on SIGTERM:

1.  The handler installed here only sets a flag, since a signal may arrive while the state is half updated.
2.  The next `Session.step` sees it (`loop.TrainingLoop.step`), saves that step, and waits for the commit. With
    several processes, the leader receives the request, and all save the same step.
3.  The iterator of `Session.steps` ends there; closing the session restores the previous handlers.

A second signal has its previous effect at once, and closing does not wait for a save then. A signal that the program
ignores stays ignored, as a shell's background jobs ignore SIGINT. A forked process, such as a data worker, ends as it
would without this package.
"""

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

import jax
from jax.experimental import multihost_utils

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """Whether this process was asked to stop, from `install_handlers` to `restore_handlers`.

    Attributes:
        reason: What asked, as in "SIGTERM asked to stop"; None if nothing did.
        number: The signal that asked; None if it was not a signal.
        is_repeated: Whether a second signal came.
    """

    def __init__(self) -> None:
        self.reason: str | None = None
        self.number: signal.Signals | None = None
        self.is_repeated = False
        self._process_id = os.getpid()
        self._previous_handlers: dict[signal.Signals, Callable[[int, FrameType | None], Any] | int | None] = {}

    def install_handlers(self) -> None:
        """Handle the signals; does nothing outside the main thread, where Python allows no handlers."""
        if self._previous_handlers or threading.current_thread() is not threading.main_thread():
            return
        for number in _SIGNALS:
            if signal.getsignal(number) == signal.SIG_IGN:
                continue
            self._previous_handlers[number] = signal.signal(number, self._handle)

    def get_reason(self, step: int) -> str | None:
        """Return the reason to stop after `step`, if there is one.

        In a distributed run the processes have to stop at the same step, and a scheduler's notice may reach only one
        of them: JAX's preemption service makes them agree.
        """
        if (
            self.reason is None
            and jax.distributed.is_initialized()
            and multihost_utils.reached_preemption_sync_point(step)
        ):
            self.reason = "a preemption notice asked to stop"
        return self.reason

    def restore_handlers(self) -> None:
        """Restore the previous handlers."""
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        self._previous_handlers = {}

    def redeliver(self) -> None:
        """Restore the previous handlers and raise the signal that asked, or SIGTERM, once more."""
        self.restore_handlers()
        signal.raise_signal(self.number or signal.SIGTERM)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if self.reason is None and os.getpid() == self._process_id:
            self.number = signal.Signals(number)
            self.reason = f"{self.number.name} asked to stop"
            return
        self.is_repeated = True
        self.restore_handlers()
        os.kill(os.getpid(), number)
