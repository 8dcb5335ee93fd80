# SPDX-License-Identifier: Apache-2.0
"""SIGTERM and SIGINT as a wish to save and leave, not as an end.

The handler only sets a flag: the training loop saves at the end of its step, where the state is whole. A second
signal leaves at once, the way it would have without us.
"""

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """Whether somebody asked this process to stop, from `listen` to `forget`."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._before: dict[signal.Signals, Callable[[int, FrameType | None], Any] | int | None] = {}

    def listen(self) -> None:
        """Take over the signals; only the main thread can, in others nothing happens."""
        if self._before or threading.current_thread() is not threading.main_thread():
            return
        for number in _SIGNALS:
            self._before[number] = signal.signal(number, self._handle)

    def forget(self) -> None:
        """Give the signals back."""
        for number, handler in self._before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        self._before = {}

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if self.received is None:
            self.received = signal.Signals(number)
            return
        self.forget()
        os.kill(os.getpid(), number)
