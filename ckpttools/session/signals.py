# SPDX-License-Identifier: Apache-2.0
"""SIGTERM, SIGINT and others: save the current step and end the loop, instead of ending the process.

What happens on SIGTERM:

1.  The one handler of this process only sets a flag in each session that is training, since a signal may arrive while
    the state is half updated.
2.  The next `Session.step` sees it (`loop.TrainingLoop.step`), saves that step, and waits for the commit. With
    several processes, the leader receives the request, and all save the same step.
3.  The iterator of `Session.steps` ends there. Once no session listens, the previous handlers are restored, unless
    another library has put its own in place meanwhile: then its handler stays, and what reaches ours is passed on to
    the one that was there before.

A signal that reaches no session that has not been asked yet has its previous effect at once, and closing does not
wait for a save then. A signal that the program ignores stays ignored, as a shell's background jobs ignore SIGINT. A
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
        SpecError: If this system does not have a signal, or a process cannot handle it.
    """
    found = []
    for name in (names,) if isinstance(names, str | int) else names:
        try:
            number = signal.Signals[name] if isinstance(name, str) else signal.Signals(name)
        except (KeyError, ValueError) as error:
            raise SpecError(
                what=f"{name!r} is not a signal of this system.",
                why="a signal asks a session to save and to end its loop.",
                fix='ct.open(spec, signals=("SIGTERM", "SIGINT", "SIGUSR1"))',
            ) from error
        if number.name in _UNCATCHABLE:
            raise SpecError(
                what=f"{number.name} cannot be handled.",
                why="the system ends or stops the process without asking it.",
                fix='ct.open(spec, signals=("SIGTERM", "SIGINT", "SIGUSR1"))',
            )
        found.append(number)
    return tuple(dict.fromkeys(found))


class StopRequest:
    """Whether a session was asked to stop.

    Args:
        signals: The signals that ask it to, from `start_listening` to `stop_listening`.

    Attributes:
        reason: What asked, as in "SIGTERM asked to stop"; None if nothing did.
        number: The signal that asked; None if it was not a signal.
        is_repeated: Whether a signal came again after it was asked.
    """

    def __init__(self, signals: tuple[signal.Signals, ...]) -> None:
        self.reason: str | None = None
        self.number: signal.Signals | None = None
        self.is_repeated = False
        self.signals = signals

    def start_listening(self) -> None:
        """Have the signals set the reason; outside the main thread only if the main thread handles them already."""
        _listener.add(self)

    def stop_listening(self) -> None:
        """Ignore further signals; restores the previous handlers if no other session listens."""
        _listener.remove(self)

    def ask(self, reason: str, number: signal.Signals | None = None) -> None:
        """Ask to stop; the first reason stays."""
        if self.reason is None:
            self.number = number
            self.reason = reason

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

    def redeliver(self) -> None:
        """Stop listening, and raise the signal that asked, or SIGTERM, once more."""
        self.stop_listening()
        signal.raise_signal(self.number or signal.SIGTERM)


class _Listener:
    """The handler of this process, which passes signals to every session that listens.

    A handler runs between any two bytecodes, so what it reads is replaced in one assignment.
    """

    def __init__(self) -> None:
        self._requests: tuple[weakref.ref[StopRequest], ...] = ()
        self._process_id = os.getpid()
        # What to restore, and what was there before this process's first session: another library's handler that was
        # put in place in between may call this one as its predecessor.
        self._previous_handlers: dict[signal.Signals, _Handler] = {}
        self._first_handlers: dict[signal.Signals, _Handler] = {}

    def add(self, request: StopRequest) -> None:
        if os.getpid() != self._process_id:
            # Forked: the parent's sessions are not this process's, but its handlers are.
            self._process_id, self._requests = os.getpid(), ()
        others = self._get_requests()
        if request not in others:
            self._requests = (*self._requests, weakref.ref(request))
        if threading.current_thread() is not threading.main_thread():
            return
        for number in request.signals:
            current = signal.getsignal(number)
            # A signal that is ignored stays so. A handler that was put in place of ours while a session listened
            # belongs to somebody who did that on purpose, and most likely calls ours.
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
