# SPDX-License-Identifier: Apache-2.0
"""Keep what native libraries print off the standard output.

Imports the standard library only. HiGHS, the solver in scipy, prints a line of its own now and then, and has no switch
for it. Python's `contextlib.redirect_stdout` does not reach it: C code writes to file descriptor 1.
"""

import contextlib
import ctypes
import os
import sys
import threading
from collections.abc import Iterator

_STDOUT, _STDERR = 1, 2
_lock = threading.Lock()
_depth = 0
_original: int | None = None


@contextlib.contextmanager
def redirect_native_stdout() -> Iterator[None]:
    """Send everything that is written to file descriptor 1 inside the block to the standard error.

    Blocks may be nested, and run in several threads: the descriptor is restored when the last of them ends. Without a
    standard output or a standard error nothing happens.

    Example:
        >>> import os
        >>> with redirect_native_stdout():
        ...     count = os.write(1, b"a line of a solver")
    """
    _enter()
    try:
        yield
    finally:
        _leave()


def _enter() -> None:
    global _depth, _original
    with _lock:
        _depth += 1
        if _depth > 1:
            return
        _flush()
        try:
            _original = os.dup(_STDOUT)
            os.dup2(_STDERR, _STDOUT)
        except OSError:  # closed by the parent process
            _restore()


def _leave() -> None:
    global _depth
    with _lock:
        _depth -= 1
        if _depth == 0:
            _flush()
            _restore()


def _restore() -> None:
    global _original
    if _original is not None:
        os.dup2(_original, _STDOUT)
        os.close(_original)
        _original = None


def _flush() -> None:
    """Write what Python and C still hold in their buffers to where the descriptor leads now."""
    # What Python printed before belongs to the old place. A replaced `sys.stdout`, as in a notebook, has no descriptor.
    with contextlib.suppress(AttributeError, OSError, ValueError):
        if sys.stdout.fileno() == _STDOUT:
            sys.stdout.flush()
    with contextlib.suppress(AttributeError, OSError, TypeError):  # Windows has no library of the whole process
        ctypes.CDLL(None).fflush(None)
