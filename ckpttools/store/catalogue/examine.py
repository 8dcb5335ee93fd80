# SPDX-License-Identifier: Apache-2.0
"""Examine the directory of one step: a committed step, another program's checkpoint, or damage of some kind."""

import contextlib
import dataclasses
import os
import pathlib
from collections.abc import Sequence

from ...errors import IncompleteStepError, StepDamagedError, StorageError, VersionError
from .. import layout
from ..formats import foreign_layouts
from ..manifest import read as read_manifest
from ..manifest import read_sealed
from .entries import Entry


def were_deleted(candidates: Sequence[Entry]) -> bool:
    """Return whether all candidates were deleted since they were listed, as retention does beside a slow reader."""
    return bool(candidates) and not any(each.fetch is not None or os.path.lexists(each.path) for each in candidates)


def is_damaged_now(entry: Entry) -> bool:
    """Return whether the manifest or the files' sizes of a committed step have been damaged since it was listed."""
    examined = examine_path(entry.path, entry.step)
    return examined is None or examined.state != entry.state


def is_still_damaged(entry: Entry) -> bool:
    """Return whether a step that was found damaged is still in its place: not deleted, repaired or replaced since.

    Another process may have saved the step again, or fetched an intact copy of it, while this one read it.
    """
    found = examine_path(entry.path, entry.step)
    if found is None or found.manifest is None:
        return found is not None and found.state in ("incomplete", "corrupt")
    if entry.manifest is None or entry.identity != found.identity:
        return False
    # Bytes can be damaged under an intact manifest. Metrics do not count: they may have been recorded since.
    before, now = (dataclasses.replace(each.manifest.summary, metrics={}) for each in (entry, found) if each.manifest)
    return before == now


def is_intact_again(entry: Entry) -> bool:
    """Return whether a step that was found damaged has been repaired or replaced by another one since."""
    found = examine_path(entry.path, entry.step)
    return found is not None and found.manifest is not None and not is_still_damaged(entry)


def make_foreign_entry(path: pathlib.Path, step: int) -> Entry:
    """Return the entry of another program's checkpoint."""
    error = IncompleteStepError(
        what=f"foreign: {path.name} was written by {foreign_layouts.describe_writer(path)}",
        why="it has no manifest, so nothing about it can be verified.",
        fix=f"ct.adopt({str(path.parent)!r}) adds one; ct.load also reads the step without a manifest.",
    )
    return Entry(step=step, path=path, state="unverified", error=error)


def examine_path(path: pathlib.Path, step: int) -> Entry | None:
    """Return the entry of a numbered directory, or of a link to one; None if the path is neither."""
    try:
        if path.is_symlink() and not path.exists():
            # It must stay listed: otherwise a run whose only step is linked would start from scratch.
            return Entry(step=step, path=path, state="unreadable", error=_make_dangling_error(path))
        return _examine_directory(path, step) if path.is_dir() else None
    except OSError as error:
        # One bad sector must not hide the other steps; restoring this one raises.
        failure = StorageError(
            what=f"step {step} cannot be read: {error}.",
            why="that is the disk or its permissions, not damage: an older step would fail in the same way.",
            fix="fix the cause and restore again, or restore(step=...) an older step by its number.",
        )
        return Entry(step=step, path=path, state="unreadable", error=failure)


def _examine_directory(path: pathlib.Path, step: int) -> Entry:
    try:
        status = path.stat()  # Before the manifest: if the directory is replaced in between, they do not fit.
        identity = (status.st_ino, status.st_mtime_ns)
        return Entry(step=step, path=path, state="committed", manifest=read_manifest(path), identity=identity)
    except IncompleteStepError as error:
        lacks_manifest = not (path / layout.MANIFEST).exists()
        if lacks_manifest and foreign_layouts.recognize(path) and not _has_spare_manifest(path.parent, step):
            return make_foreign_entry(path, step)
        return Entry(step=step, path=path, state="incomplete", error=error)
    except VersionError as error:
        return Entry(step=step, path=path, state="newer", error=error)
    except StepDamagedError as error:
        return Entry(step=step, path=path, state="corrupt", error=error)


def _make_dangling_error(path: pathlib.Path) -> StorageError:
    return StorageError(
        what=f"step {path.name} is a link to {path.readlink()}, which does not exist.",
        why="the step was moved, most likely to a disk that is not mounted; that is not damage.",
        fix=f"mount that disk, or remove the link {path} if the step is gone; restore(step=...) restores another one.",
    )


def _has_spare_manifest(root: pathlib.Path, step: int) -> bool:
    """Return whether a step without a manifest once had one: plain Orbax steps have no second copy."""
    spares = layout.get_control_path(root, "spare")
    for spare in spares.iterdir() if spares.is_dir() else ():
        with contextlib.suppress(StepDamagedError, VersionError, OSError):
            if read_sealed(spare).summary.step == step:
                return True
    return False
