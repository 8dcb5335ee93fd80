# SPDX-License-Identifier: Apache-2.0
"""Run a call where no signal handler can raise: Python runs handlers only in the main thread.

A handler's exception inside a library may leave its locks held. asyncio, which Orbax uses for reading, swallows such an
exception and then waits forever for the result.
"""

import _thread
import contextvars
import threading
from collections.abc import Callable
from typing import Any

_POLL_S = 0.1
"""How long a lost wake-up can delay the result, in seconds."""


def run_outside_main_thread[T](function: Callable[[], T]) -> T:
    """Return what `function` returns, or raise its error; from the main thread, run it in a new thread.

    If the caller is interrupted, the function still runs to its end, so it must be safe to run unobserved.

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
    # An interrupted wait may have acquired the lock already, so only the result shows that the call has ended.
    while not results:
        has_ended.acquire(timeout=_POLL_S)
    result, error = results.pop()
    if error is not None:
        raise error
    return result  # type: ignore[no-any-return]
