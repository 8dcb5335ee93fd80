# SPDX-License-Identifier: Apache-2.0
"""The only moves that change a run's directory, each of them safe against a kill or power cut at any moment.

Commit: fsync every file and directory of the step, rename once, fsync both parents, and only then delete anything.
Delete: rename into the trash, fsync the parents, then remove the files one by one. A kill leaves a step whole, absent
or in the trash, never partial; after a commit, a power cut finds it on the disk.

`fsync` and `rename` are called through `os`, so that the tests can record them.
"""

import contextlib
import fcntl
import os
import pathlib
import shutil
from collections.abc import Iterator

from ..errors import StepDamagedError, StorageError, VersionError
from . import layout, manifest

MAX_SPARE_BYTES = 1 << 16
"""Files up to this size get a second copy: all of Orbax's metadata, and hardly any array data."""

TEMPORARY = ".new"
"""How the name of a file ends that a kill can leave; it is removed, or ignored, and never part of a step."""

IN_USE = "in-use"
"""The file in a directory in staging that its process has locked."""


@contextlib.contextmanager
def wrap_os_errors(what: str, fix: str = "fix the cause and try again; no step was changed.") -> Iterator[None]:
    """Raise an `OSError` of the block as a `StorageError` that begins with `what`."""
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        raise StorageError(
            what=f"{what}: {error}.", why="that is the disk or its permissions; nothing was lost.", fix=fix
        ) from error


def raise_for_os_error(error: OSError) -> None:
    """Raise the error that `os.walk` would swallow: it treats a directory that cannot be listed as empty."""
    raise error


def sync_file(path: pathlib.Path) -> None:
    """Flush a file or directory to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(directory: pathlib.Path) -> None:
    """Flush every file and directory below `directory`, children before parents, and then `directory`."""
    for parent, _, names in os.walk(directory, topdown=False, onerror=raise_for_os_error):
        for name in names:
            sync_file(pathlib.Path(parent, name))
        sync_file(pathlib.Path(parent))


def make_directory(directory: pathlib.Path) -> None:
    """Create a directory and its parents, and make each new entry durable."""
    if directory.is_dir():
        return
    make_directory(directory.parent)
    directory.mkdir(exist_ok=True)
    sync_file(directory.parent)


def move(source: pathlib.Path, target: pathlib.Path) -> None:
    """Rename a directory, or a link to one, and sync the old and the new parent."""
    make_directory(target.parent)
    if source.is_symlink() and not source.readlink().is_absolute():
        # A relative link would have another target after the move.
        absolute = source.with_name(f"{source.name}.new")
        absolute.unlink(missing_ok=True)
        absolute.symlink_to(source.parent / source.readlink())
        os.replace(absolute, source)
    os.rename(source, target)
    sync_file(target.parent)
    sync_file(source.parent)


def commit_step(root: pathlib.Path, staged: pathlib.Path, step: int, *, replaces: bool = False) -> pathlib.Path:
    """Make a complete staged step visible under its number.

    What already has the number is moved aside first: a superseded step, or a directory or file that never was a step.
    If the staged step cannot be moved there, it is moved back.

    Args:
        root: The run's directory.
        staged: The step.
        step: Its number.
        replaces: Whether a step of that number belongs into quarantine, because another copy of it takes its place.
    """
    target = layout.get_step_directory(root, step)
    sync_tree(staged)
    part = "superseded" if _is_step(target) and not replaces else "quarantine"
    aside = layout.find_free_path(layout.get_control_path(root, part), str(step))
    try:
        if os.path.lexists(target):
            move(target, aside)
        move(staged, target)
    except OSError as error:
        if staged.exists() or not os.path.lexists(target):
            with contextlib.suppress(OSError):
                if os.path.lexists(aside) and not os.path.lexists(target):
                    move(aside, target)
            raise
        raise StorageError(
            what=f"step {step} is in its place, but the disk did not confirm it: {error}.",
            why="a power cut could lose it; all earlier steps are as they were.",
            fix="check the disk; the next save tries again.",
        ) from error
    return target


def _is_step(directory: pathlib.Path) -> bool:
    with contextlib.suppress(StepDamagedError, VersionError):
        return directory.is_dir() and bool(manifest.read(directory))
    return False


def discard(root: pathlib.Path, directory: pathlib.Path) -> None:
    """Delete a directory of the run: rename it into the trash, then remove its files."""
    delete_tree(move_to_trash(root, directory))


def move_to_trash(root: pathlib.Path, directory: pathlib.Path) -> pathlib.Path:
    """Move a directory of the run to the trash, which `sweep` empties; return where it is."""
    in_trash = layout.find_free_path(layout.get_control_path(root, "trash"), directory.name)
    move(directory, in_trash)
    return in_trash


def delete_tree(path: pathlib.Path) -> None:
    """Delete a directory, a file or a link; what a link leads to is outside the run and stays."""
    with contextlib.suppress(OSError):
        if path.is_symlink() or not path.is_dir():
            path.unlink()
        else:
            shutil.rmtree(path, ignore_errors=True)


def quarantine(root: pathlib.Path, directory: pathlib.Path) -> pathlib.Path:
    """Move a damaged step to quarantine, with all its bytes."""
    target = layout.find_free_path(layout.get_control_path(root, "quarantine"), directory.name)
    move(directory, target)
    return target


def sweep(root: pathlib.Path) -> None:
    """Remove what a killed process left behind; only for the process that holds the lock."""
    for part in ("staging", "trash", "outbox"):
        directory = layout.get_control_path(root, part)
        if directory.is_dir():
            for entry in directory.iterdir():
                if not is_in_use(entry):
                    delete_tree(entry)
    own = layout.get_control_path(root)
    for entry in own.iterdir() if own.is_dir() else ():
        # Another process may be changing the pins: their lock is not the writer's.
        if entry.suffix == TEMPORARY and not entry.name.startswith("pins."):
            entry.unlink(missing_ok=True)


@contextlib.contextmanager
def mark_in_use(holder: pathlib.Path) -> Iterator[None]:
    """Keep a directory in staging from being removed by `sweep`: a reader fetches into it without the run's lock.

    The mark is a lock of the kernel's, so it vanishes with its process.
    """
    with (holder / IN_USE).open("ab") as file:
        with contextlib.suppress(OSError):  # Without locks, a writer that opens the run meanwhile ends the fetch.
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        yield


def is_in_use(holder: pathlib.Path) -> bool:
    """Return whether a process works in a directory in staging."""
    try:
        with (holder / IN_USE).open("r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def copy_small_files(directory: pathlib.Path, spare: pathlib.Path) -> None:
    """Write second copies of a committed step's manifest and metadata, for `repair`; they are optional."""
    with contextlib.suppress(OSError):
        if spare.is_symlink():
            spare.unlink()
        # Never write into, or follow, an entry that exists already.
        shutil.rmtree(spare, ignore_errors=True)
        for parent, _, names in os.walk(directory):
            for name in names:
                path = pathlib.Path(parent, name)
                if path.stat().st_size <= MAX_SPARE_BYTES or name == layout.MANIFEST:
                    target = spare / path.relative_to(directory)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(path, target)


def write_file(path: pathlib.Path, data: bytes, *, temporary: pathlib.Path | None = None) -> None:
    """Replace a small file in one step, durably.

    Args:
        path: The file.
        data: Its bytes.
        temporary: What is written first, on the same file system; None for a name beside the file.
    """
    make_directory(path.parent)
    temporary = temporary or path.with_name(f"{path.name}{TEMPORARY}")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_file(path.parent)


def require_writable(root: pathlib.Path) -> None:
    """Create the run's directory if needed and verify that it can be written.

    Raises:
        StorageError: If it cannot, before anything was trained.
    """
    try:
        make_directory(layout.get_control_path(root))
        probe = layout.get_control_path(root, f"probe-{os.getpid()}")
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise StorageError(
            what=f"{root} cannot be written: {error}.",
            why="no step of this run could be saved there.",
            fix="choose another directory or fix its permissions; nothing was written or lost.",
        ) from error


def require_confined(root: pathlib.Path) -> None:
    """Raise `StorageError` if the run's control directory, or anything directly in it, is a link.

    Staging and trash are emptied; the lock, pins and second copies are written. A run may come from anybody: if one of
    these were a link, files outside the run would be deleted or overwritten. Called before every write.
    """
    control = layout.get_control_path(root)
    if control.is_symlink():
        raise _make_control_link_error(control)
    if not control.is_dir():
        return
    with os.scandir(control) as entries:
        for entry in entries:
            if entry.is_symlink():
                raise _make_control_link_error(pathlib.Path(entry.path))


def _make_control_link_error(path: pathlib.Path) -> StorageError:
    return StorageError(
        what=f"{path} is a link.",
        why="files outside the run would be written and deleted; nothing was touched.",
        fix="remove the link; if the run came from somebody else, do not trust it.",
    )
