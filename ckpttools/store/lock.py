# SPDX-License-Identifier: Apache-2.0
"""One writer for each run.

Two processes that save into one directory would prune each other's steps. The lock is advisory and held by the kernel
(`flock`): it vanishes with its process, so a kill leaves nothing to clean up. A forked child would share it, and hold
it after the writer was killed, so the child closes it.
"""

import contextlib
import fcntl
import os
import pathlib
import weakref

from ..errors import RunInUseError, StorageError
from . import commit, confine, layout


class WriterLock:
    """The right to write to a run's directory, from `acquire` to `release`."""

    def __init__(self, root: pathlib.Path) -> None:
        self._root = root
        self._descriptor: int | None = None

    @property
    def is_held(self) -> bool:
        """Whether this object holds the lock."""
        return self._descriptor is not None

    def acquire(self) -> None:
        """Take the lock.

        Raises:
            RunInUseError: If another process holds it.
            StorageError: If it cannot be opened or locked.
        """
        if self.is_held:
            return
        with commit.wrap_os_errors(f"{layout.get_control_path(self._root)} cannot be read"):
            confine.require_confined(self._root)
        path = layout.get_control_path(self._root, "lock")
        try:
            commit.make_directory(layout.get_control_path(self._root))
            descriptor = _open_lock(path)
        except OSError as error:
            raise StorageError(
                what=f"{path} cannot be opened: {error}.",
                why="every process that changes a run holds its lock, so that no two do at once; nothing was changed.",
                fix="fix the permissions; reading (ls, verify, a dry run, restore) needs no lock.",
            ) from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            owner = _read_owner(descriptor)
            os.close(descriptor)
            raise RunInUseError(
                what=f"{self._root} is being written by process {owner}.",
                why="two writers would delete each other's steps.",
                fix="wait for that process, or use another directory for this run; reading needs no lock.",
            ) from error
        except OSError as error:
            os.close(descriptor)
            raise StorageError(
                what=f"{path} cannot be locked: {error}.",
                why="without a lock two writers would delete each other's steps; nothing was changed.",
                fix="use a file system with locks (NFS needs its lock service); reading needs no lock.",
            ) from error
        owner_ref = weakref.ref(self)

        def close_in_fork() -> None:
            lock = owner_ref()
            if lock is not None and lock._descriptor == descriptor:
                lock.release()

        os.register_at_fork(after_in_child=close_in_fork)
        # The owner's name is informational: a full disk must not deny a lock that was granted.
        with contextlib.suppress(OSError):
            os.ftruncate(descriptor, 0)
            os.write(descriptor, str(os.getpid()).encode())
        self._descriptor = descriptor

    def release(self) -> None:
        """Release the lock; does nothing if it is not held."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def _open_lock(path: pathlib.Path) -> int:
    """Open the lock with the permissions that the umask leaves, as every other file of the run has them.

    Earlier versions made it writable for its owner only. `flock` needs no right to write, so a colleague of the same
    group, who may write to the directory, can hold such a lock all the same.
    """
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except PermissionError:
        if not os.access(path.parent, os.W_OK, effective_ids=os.access in os.supports_effective_ids):
            raise
        return os.open(path, os.O_RDONLY)


def _read_owner(descriptor: int) -> str:
    try:
        return os.read(descriptor, 32).decode(errors="replace").strip() or "unknown"
    except OSError:
        return "unknown"
