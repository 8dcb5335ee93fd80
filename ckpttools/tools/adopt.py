# SPDX-License-Identifier: Apache-2.0
"""`adopt`: add manifests to steps that plain Orbax wrote, so that they can be verified from now on.

Nothing of a step is changed; a manifest is added. It records what is on the disk today: whether that is what was once
saved cannot be current, since Orbax stores no digest of it.
"""

import json
import os
import pathlib
import secrets

from ..errors import StorageError
from ..save.write_step import add_digests, describe_files
from ..store import catalogue, commit, manifest, orbax
from ..store.lock import WriterLock
from ..store.run_directory import require_run_directory
from ..tree import snapshot


def adopt(directory: str | os.PathLike[str], *, dry_run: bool = False) -> tuple[int, ...]:
    """Write manifests for the steps of plain Orbax (v0 and v1) in a run's directory.

    Args:
        directory: The directory whose numbered directories are the steps.
        dry_run: Only return which steps would be adopted.

    Returns:
        The steps, in increasing order.

    Raises:
        StorageError: If a step cannot be read; those before it are adopted.
        RunInUseError: If a process writes to the run.

    Example:
        >>> import tempfile
        >>> import ckpttools as ct
        >>> run = tempfile.mkdtemp()
        >>> with ct.open(ct.CheckpointSpec(directory=run, storage=ct.Storage(asynchronous=False))) as ckpt:
        ...     saved = [ckpt.save(step, {"count": step}) for step in (1, 2)]
        >>> ct.adopt(run, dry_run=True)  # this run has no steps of plain Orbax
        ()
    """
    root = require_run_directory(directory)
    foreign = [entry for entry in catalogue.scan(root).entries if entry.state == "unverified"]
    if dry_run:
        for entry in foreign:
            try:
                orbax.describe_foreign(entry.path)
            except orbax.ReadError as error:
                raise _make_unreadable_error(entry, str(error)) from error
    if not foreign or dry_run:
        return tuple(entry.step for entry in foreign)
    lock = WriterLock(root)
    lock.acquire()
    try:
        current = catalogue.scan(root)
        lineage = current.lineage or ((secrets.token_hex(4), 0),)
        for sequence, entry in enumerate(foreign, start=current.next_sequence):
            _adopt_step(entry, sequence, lineage)
    finally:
        lock.release()
    return tuple(entry.step for entry in foreign)


def _adopt_step(entry: catalogue.Entry, sequence: int, lineage: manifest.Lineage) -> None:
    if entry.path.is_symlink():
        raise _make_unreadable_error(entry, "it is a link, and nothing is written outside the run")
    try:
        state = orbax.read_foreign(entry.path)
    except orbax.ReadError as error:
        raise _make_unreadable_error(entry, str(error)) from error
    if not state:
        raise _make_unreadable_error(entry, "it has no items")
    algorithm = "xxh3"
    digested = add_digests(algorithm, snapshot.take(state, None, rules=()))
    items = {name: manifest.Item(records=records, skeletons={}) for name, records in digested.records.items()}
    summary = manifest.Summary(
        step=entry.step,
        sequence=sequence,
        saved_at=(entry.path / "_CHECKPOINT_METADATA").stat().st_mtime,
        run_s=0.0,
        metrics=_read_metrics(entry.path),
        lineage=lineage,
        reason="adopted from plain Orbax",
        spec="",
        files=describe_files(entry.path, algorithm),
    )
    manifest.write(entry.path, summary, manifest.Contents(items=items), algorithm=algorithm)
    commit.sync_tree(entry.path)


def _make_unreadable_error(entry: catalogue.Entry, text: str) -> StorageError:
    return StorageError(
        what=f"step {entry.step} cannot be adopted: {text.rstrip('.')}.",
        why="Orbax cannot read it as named items.",
        fix=f"move {entry.path} away, or save it again with named items (args=Composite(model=...)).",
    )


def _read_metrics(directory: pathlib.Path) -> dict[str, float]:
    """Return metrics as Orbax's managers write them; none if they cannot be read, since nothing depends on them."""
    try:
        found = json.loads((directory / "metrics" / "metrics").read_bytes())
        return {str(name): float(value) for name, value in found.items() if isinstance(value, int | float)}
    except (OSError, ValueError, AttributeError):
        return {}
