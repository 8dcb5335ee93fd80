# SPDX-License-Identifier: Apache-2.0
"""One writer for each run.

Two processes that save into one directory would prune each other's steps. The lock is advisory and held by the kernel
(`flock`): it vanishes with its process, so a kill leaves nothing to clean up. A forked child would share it, and hold
it after the writer was killed, so the child closes it.

A call may be interrupted at any bytecode. The lock is held exactly as long as its file is open, and a file that an
interrupted `acquire` left open is closed by the next `acquire`.
"""

import contextlib
import fcntl
import os
import pathlib
import time
import weakref
from collections.abc import Iterator
from typing import BinaryIO

from ..errors import RunInUseError, StorageError
from . import commit, layout

_PINS_WAIT_S = 30.0
"""Writing the two small lists of pins takes milliseconds."""

_locks: "weakref.WeakSet[WriterLock]" = weakref.WeakSet()


class WriterLock:
    """The right to write to a run's directory, from `acquire` to `release`."""

    def __init__(self, root: pathlib.Path) -> None:
        self._root = root
        self._locked_file: BinaryIO | None = None
        self._open_files: list[BinaryIO] = []
        _locks.add(self)

    @property
    def is_held(self) -> bool:
        """Whether this object holds the lock."""
        return self._locked_file is not None and not self._locked_file.closed

    def acquire(self) -> None:
        """Take the lock.

        Raises:
            RunInUseError: If another process holds it.
            StorageError: If it cannot be opened or locked.
        """
        if self.is_held:
            return
        self.release()
        with commit.wrap_os_errors(f"{layout.get_control_path(self._root)} cannot be read"):
            commit.require_confined(self._root)
        path = layout.get_control_path(self._root, "lock")
        try:
            commit.make_directory(layout.get_control_path(self._root))
            self._open_files.append(_open_lock(path))
        except OSError as error:
            raise StorageError(
                what=f"{path} cannot be opened: {error}.",
                why="every process that changes a run holds its lock, so that no two do at once; nothing was changed.",
                fix="fix the permissions; reading (ls, verify, a dry run, restore) needs no lock.",
            ) from error
        file = self._open_files[-1]
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            owner = _read_owner(file)
            self.release()
            is_own = owner == str(os.getpid())
            raise RunInUseError(
                what=f"{self._root} is being written by process {owner}{', which is this one' if is_own else ''}.",
                why="two writers would delete each other's steps.",
                fix="close the other session first; reading needs no lock."
                if is_own
                else "wait for that process, or use another directory for this run; reading needs no lock.",
            ) from error
        except OSError as error:
            self.release()
            raise StorageError(
                what=f"{path} cannot be locked: {error}.",
                why="without a lock two writers would delete each other's steps; nothing was changed.",
                fix="use a file system with locks (NFS needs its lock service); reading needs no lock.",
            ) from error
        # The owner's name is informational: a full disk must not deny a lock that was granted.
        with contextlib.suppress(OSError):
            os.ftruncate(file.fileno(), 0)
            os.write(file.fileno(), str(os.getpid()).encode())
        self._locked_file = file

    @contextlib.contextmanager
    def hold(self) -> Iterator[None]:
        """Hold the lock in a `with` statement; afterwards it is as it was before."""
        was_held = self.is_held
        self.acquire()
        try:
            yield
        finally:
            if not was_held:
                self.release()

    def release(self) -> None:
        """Release the lock; does nothing if it is not held."""
        for file in self._open_files:
            file.close()
        self._open_files.clear()
        self._locked_file = None


@contextlib.contextmanager
def hold_pins_lock(root: pathlib.Path) -> Iterator[None]:
    """Hold the lock of the list of pins, which is read, changed and written by any process; waits for another one.

    Raises:
        StorageError: If it cannot be opened or locked, or another process holds it for long.
    """
    path = layout.get_control_path(root, "pins.lock")
    with commit.wrap_os_errors(f"{path} cannot be locked"), contextlib.ExitStack() as stack:
        commit.require_confined(root)
        commit.make_directory(path.parent)
        file, end = stack.enter_context(_open_lock(path)), time.monotonic() + _PINS_WAIT_S
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > end:
                    raise
                time.sleep(0.01)
        yield


def sweep_pins(root: pathlib.Path) -> None:
    """Remove what a process left that was killed while it changed the pins; a process that does so now keeps it."""
    for path in layout.get_control_path(root).glob(f"pins.*{commit.TEMPORARY}"):
        with hold_pins_lock(root):
            path.unlink(missing_ok=True)


def _open_lock(path: pathlib.Path) -> BinaryIO:
    """Open the lock; its permissions follow the umask, like those of every other file of the run.

    Earlier versions made it writable only for its owner. `flock` does not require write permission, so a colleague of
    the same group, who may write to the directory, can still hold such a lock.
    """
    try:
        return path.open("a+b", buffering=0)
    except PermissionError:
        if not os.access(path.parent, os.W_OK, effective_ids=os.access in os.supports_effective_ids):
            raise
        return path.open("rb", buffering=0)


def _read_owner(file: BinaryIO) -> str:
    try:
        file.seek(0)
        return file.read(32).decode(errors="replace").strip() or "unknown"
    except OSError:
        return "unknown"


def _close_in_fork() -> None:
    for lock in list(_locks):
        lock.release()


os.register_at_fork(after_in_child=_close_in_fork)
