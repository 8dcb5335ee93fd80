# SPDX-License-Identifier: Apache-2.0
"""On SIGTERM, SIGINT and other signals, save the current step and end the loop, instead of ending the process.

What happens on SIGTERM:

1.  The process has one handler, which only sets a flag in each session that is training, since a signal may arrive
    while the state is half updated.
2.  The next `Session.step` reads the flag (`loop.TrainingLoop.step`), saves that step, and waits for the commit. With
    several processes, the leader receives the request, and all save the same step.
3.  The iterator of `Session.steps` ends there. Once no session listens, the previous handlers are restored, unless
    another library has installed its own meanwhile. Then its handler stays, and signals that it passes to ours are
    forwarded to the handler that was installed before ours.

If all listening sessions have already been asked to stop, a further signal has its previous effect at once, and closing
no longer waits for a save. A signal that the program ignores stays ignored; a shell's background jobs ignore SIGINT. A
forked process, such as a data worker, ends as it would without this package.
"""

import os
import signal
import threading
import weakref
from collections.abc import Callable, Iterable
from types import FrameType
from typing import Any

import jax
from jax.experimental import multihost_utils

from ..errors import SpecError

DEFAULT_SIGNALS = ("SIGTERM", "SIGINT")

_UNCATCHABLE = ("SIGKILL", "SIGSTOP")

type _Handler = Callable[[int, FrameType | None], Any] | int | None


def as_signals(names: Iterable[str | int]) -> tuple[signal.Signals, ...]:
    """Return signals by their names or numbers.

    Raises:
        SpecError: If a signal does not exist on this system, or cannot be handled.
    """
    found = []
    for name in (names,) if isinstance(names, str | int) else names:
        try:
            number = signal.Signals[name] if isinstance(name, str) else signal.Signals(name)
        except (KeyError, ValueError) as error:
            raise SpecError(
                what=f"{name!r} is not a signal of this system.",
                why="the session could never be asked to stop by it.",
                fix='ct.open(spec, signals=("SIGTERM", "SIGINT", "SIGUSR1"))',
            ) from error
        if number.name in _UNCATCHABLE:
            raise SpecError(
                what=f"{number.name} cannot be handled.",
                why="the system ends or stops the process without calling a handler.",
                fix='ct.open(spec, signals=("SIGTERM", "SIGINT", "SIGUSR1"))',
            )
        found.append(number)
    return tuple(dict.fromkeys(found))


class StopRequest:
    """Whether a session was asked to stop.

    Args:
        signals: The signals that request a stop, from `start_listening` to `stop_listening`.

    Attributes:
        reason: The cause, as in "SIGTERM asked to stop"; None without a request.
        number: The signal that requested the stop; None if it was not a signal.
        is_repeated: Whether a signal arrived after the request.
    """

    def __init__(self, signals: tuple[signal.Signals, ...]) -> None:
        self.reason: str | None = None
        self.number: signal.Signals | None = None
        self.is_repeated = False
        self.signals = signals

    def start_listening(self) -> None:
        """Let the signals set the reason; outside the main thread, only if the handler is already installed."""
        _listener.add(self)

    def stop_listening(self) -> None:
        """Ignore further signals, and restore the previous handlers if no other session listens."""
        _listener.remove(self)

    def ask(self, reason: str, number: signal.Signals | None = None) -> None:
        """Request a stop; the first reason is kept."""
        if self.reason is None:
            self.number = number
            self.reason = reason

    def get_reason(self, step: int) -> str | None:
        """Return the reason to stop after `step`, if there is one.

        In a distributed run all processes must stop at the same step, but a scheduler's notice may reach only one of
        them. JAX's preemption service makes them agree.
        """
        if (
            self.reason is None
            and jax.distributed.is_initialized()
            and multihost_utils.reached_preemption_sync_point(step)
        ):
            self.reason = "a preemption notice asked to stop"
        return self.reason

    def redeliver(self) -> None:
        """Stop listening, and raise again the signal that requested the stop, or SIGTERM."""
        self.stop_listening()
        signal.raise_signal(self.number or signal.SIGTERM)


class _Listener:
    """The signal handler of this process, which notifies every session that listens.

    A handler may run between any two bytecodes, so everything that it reads is replaced in one assignment.
    """

    def __init__(self) -> None:
        self._requests: tuple[weakref.ref[StopRequest], ...] = ()
        self._process_id = os.getpid()
        # The handlers to restore, and the handlers before this process's first session: another library's handler that
        # was installed in between may call this one as its predecessor.
        self._previous_handlers: dict[signal.Signals, _Handler] = {}
        self._first_handlers: dict[signal.Signals, _Handler] = {}

    def add(self, request: StopRequest) -> None:
        if os.getpid() != self._process_id:
            # A fork inherits the parent's handlers but not its sessions.
            self._process_id, self._requests = os.getpid(), ()
        others = self._get_requests()
        if request not in others:
            self._requests = (*self._requests, weakref.ref(request))
        if threading.current_thread() is not threading.main_thread():
            return
        for number in request.signals:
            current = signal.getsignal(number)
            # An ignored signal stays ignored. A handler that replaced ours while a session listened was installed on
            # purpose, and most likely calls ours.
            is_replaced = number in self._previous_handlers and any(number in each.signals for each in others)
            if current not in (signal.SIG_IGN, self.handle) and not is_replaced:
                self._first_handlers.setdefault(number, current)
                signal.signal(number, self.handle)
                self._previous_handlers[number] = current

    def remove(self, request: StopRequest) -> None:
        self._requests = tuple(each for each in self._requests if each() not in (request, None))
        needed = {number for each in self._get_requests() for number in each.signals}
        if threading.current_thread() is threading.main_thread():
            for number in {*self._first_handlers} - needed:
                if signal.getsignal(number) == self.handle:
                    self._restore(number)
                else:
                    self._previous_handlers.pop(number, None)

    def handle(self, signal_number: int, frame: FrameType | None) -> None:
        number = signal.Signals(signal_number)
        is_own = os.getpid() == self._process_id
        asked = [each for each in self._get_requests() if is_own and number in each.signals]
        waiting = [each for each in asked if each.reason is None]
        for request in waiting:
            request.ask(f"{number.name} asked to stop", number)
        if not waiting:
            for request in asked:
                request.is_repeated = True
            self._pass_on(number, frame)

    def _pass_on(self, number: signal.Signals, frame: FrameType | None) -> None:
        """Do what the signal did before this package handled it."""
        if signal.getsignal(number) == self.handle:
            self._restore(number)
            os.kill(os.getpid(), number)
            return
        # Another library's handler has called this one.
        first = self._first_handlers.get(number, signal.SIG_DFL)
        if callable(first):
            first(number, frame)
        elif first != signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def _restore(self, number: signal.Signals) -> None:
        first = self._first_handlers.get(number)
        previous = self._previous_handlers.get(number, first)
        signal.signal(number, previous if previous is not None else signal.SIG_DFL)
        self._previous_handlers.pop(number, None)
        self._first_handlers.pop(number, None)

    def _get_requests(self) -> list[StopRequest]:
        return [request for each in self._requests if (request := each()) is not None]


_listener = _Listener()
