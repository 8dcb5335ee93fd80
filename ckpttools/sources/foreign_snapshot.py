# SPDX-License-Identifier: Apache-2.0
"""Read another program's checkpoint as a step: its leaves get records and digests, as if they had just been saved.

`adopt` writes the result to disk; `load` and `preview` only use it. A flax file is first converted to Orbax's format,
because steps are read through Orbax.
"""

import contextlib
import dataclasses
import json
import pathlib
import tempfile
from collections.abc import Iterable, Iterator
from typing import Any

from ..errors import CheckpointError, IncompleteStepError
from ..save.write_step import add_digests, describe_files
from ..store import manifest, orbax
from ..store.catalogue import Entry
from ..store.formats import flax_msgpack
from ..store.formats.foreign_layouts import BARE_ITEM, ORBAX_METADATA, recognize
from ..tree import snapshot
from ..tree.snapshot import Snapshot

_ALGORITHM = "xxh3"


def read_snapshot(entry: Entry) -> Snapshot:
    """Read all leaves of another program's checkpoint to the host, with digests.

    Raises:
        IncompleteStepError: If it cannot be read, or is empty.
    """
    try:
        if recognize(entry.path) == "msgpack":
            state: dict[str, Any] = {BARE_ITEM: flax_msgpack.read(entry.path)}
        else:
            state = orbax.read_foreign(entry.path)
    except orbax.ReadError as error:
        raise _make_unreadable_error(entry, str(error)) from error
    except CheckpointError as error:
        raise _make_unreadable_error(entry, error.what) from error
    if not state:
        raise _make_unreadable_error(entry, "it has no items")
    return add_digests(_ALGORITHM, snapshot.take(state, None, rules=()))


def _make_unreadable_error(entry: Entry, text: str) -> IncompleteStepError:
    return IncompleteStepError(
        what=f"{entry.path} cannot be read: {text.rstrip('.')}.",
        why="another program wrote it, without digests: it may be damaged, or its format is unknown.",
        fix=f"move {entry.path} away to use the other steps, or read it with the program that wrote it.",
    )


def make_manifest(
    entry: Entry, taken: Snapshot, directory: pathlib.Path, *, sequence: int = 1, lineage: manifest.Lineage = ()
) -> bytes:
    """Return the manifest of a checkpoint.

    Args:
        entry: The checkpoint.
        taken: Its leaves.
        directory: The directory of its files, which are read and digested.
        sequence: Its position in the order of the commits.
        lineage: The branches that led to it.
    """
    items = {name: manifest.Item(records=records, skeletons={}) for name, records in taken.records.items()}
    stamp = entry.path / ORBAX_METADATA
    summary = manifest.Summary(
        step=entry.step,
        sequence=sequence,
        saved_at=(stamp if stamp.is_file() else entry.path).stat().st_mtime,
        run_s=0.0,
        metrics=_read_metrics(entry.path),
        lineage=lineage or (("foreign", 0),),
        reason="adopted from plain Orbax" if entry.path.is_dir() else "adopted from flax's msgpack",
        spec="",
        files=describe_files(directory, _ALGORITHM),
    )
    return manifest.serialize(summary, manifest.Contents(items=items), algorithm=_ALGORITHM)


def _read_metrics(directory: pathlib.Path) -> dict[str, float]:
    """Return the metrics that an Orbax manager wrote; none if they cannot be read, since nothing depends on them."""
    try:
        found = json.loads((directory / "metrics" / "metrics").read_bytes())
        return {str(name): float(value) for name, value in found.items() if isinstance(value, int | float)}
    except (OSError, ValueError, AttributeError):
        return {}


@contextlib.contextmanager
def read_as_steps(entries: Iterable[Entry]) -> Iterator[Iterator[Entry]]:
    """Yield the entries, those of other programs converted to committed steps; each is read when it is reached."""
    with tempfile.TemporaryDirectory(prefix="ckpttools-", ignore_cleanup_errors=True) as holder:
        yield (
            _read_as_step(entry, pathlib.Path(holder)) if entry.state == "unverified" else entry for entry in entries
        )


def _read_as_step(entry: Entry, holder: pathlib.Path) -> Entry:
    try:
        taken = read_snapshot(entry)
    except IncompleteStepError as error:
        # Skipped like a damaged step of our own.
        return dataclasses.replace(entry, state="incomplete", error=error)
    place = entry.path
    if place.is_file():
        place = holder / str(entry.step)
        orbax.write(place, taken, compression=False)
    data = make_manifest(entry, taken, place)
    return dataclasses.replace(entry, state="committed", path=place, manifest=manifest.parse_manifest(data), error=None)
