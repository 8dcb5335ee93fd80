# SPDX-License-Identifier: Apache-2.0
"""Run a call where no signal handler can raise: Python runs handlers in the main thread only.

An exception from a handler in the middle of a library's code may leave its locks held. asyncio, which Orbax reads
with, swallows such an exception and then waits for ever for the result.
"""

import _thread
import contextvars
import threading
from collections.abc import Callable
from typing import Any

_POLL_S = 0.1
"""How long a lost wake-up can delay the result, in seconds."""


def run_outside_main_thread[T](function: Callable[[], T]) -> T:
    """Return what `function` returns, or raise its error, from a thread of its own if this is the main thread.

    The caller may be interrupted; the function then goes on to its end, so it must have no effect that matters.

    Args:
        function: Called once, with the caller's context variables.
    """
    if threading.current_thread() is not threading.main_thread():
        return function()
    context = contextvars.copy_context()
    results: list[tuple[Any, BaseException | None]] = []
    has_ended = _thread.allocate_lock()
    has_ended.acquire()

    def run() -> None:
        try:
            results.append((context.run(function), None))
        except BaseException as error:
            results.append((None, error))
        has_ended.release()

    _thread.start_new_thread(run, ())
    # Another part of an interrupted wait may have taken the lock, so the result alone says that the call has ended.
    while not results:
        has_ended.acquire(timeout=_POLL_S)
    result, error = results.pop()
    if error is not None:
        raise error
    return result  # type: ignore[no-any-return]
