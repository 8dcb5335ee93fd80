# SPDX-License-Identifier: Apache-2.0
"""SIGTERM and SIGINT as a wish to save and leave, not as an end.

The handler only sets a flag: the training loop saves at the end of its step, where the state is whole. A second
signal leaves at once, the way it would have without us. A signal that the program ignores, as a shell's background
jobs ignore SIGINT, stays ignored; and a process that was forked off meanwhile, such as a data worker, ends by it.
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
    """Whether somebody asked this process to stop, from `install_handlers` to `restore_handlers`.

    Attributes:
        reason: Who asked, as half a sentence; None as long as nobody did.
        number: The signal that asked; None if it was none.
        is_repeated: Whether a second one came.
    """

    def __init__(self) -> None:
        self.reason: str | None = None
        self.number: signal.Signals | None = None
        self.is_repeated = False
        self._process_id = os.getpid()
        self._previous_handlers: dict[signal.Signals, Callable[[int, FrameType | None], Any] | int | None] = {}

    def install_handlers(self) -> None:
        """Take over the signals; only the main thread can, in others nothing happens."""
        if self._previous_handlers or threading.current_thread() is not threading.main_thread():
            return
        for number in _SIGNALS:
            if signal.getsignal(number) == signal.SIG_IGN:
                continue
            self._previous_handlers[number] = signal.signal(number, self._handle)

    def get_reason(self, step: int) -> str | None:
        """The reason to stop after `step`, if there is one.

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
        """Give the signals back."""
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        self._previous_handlers = {}

    def redeliver(self) -> None:
        """Give the signals back and let the one that asked, or SIGTERM, do what it would have done without us."""
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
