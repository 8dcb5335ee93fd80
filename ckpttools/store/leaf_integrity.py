# SPDX-License-Identifier: Apache-2.0
"""Where a corrupt leaf is found: leaves are read to the host and their digests compared with the manifest.

Orbax restored 149 of 150 single flipped bits without an error, and for other damage it raises anything from ValueError
to a bare Exception. So its errors are not interpreted: the files' digests decide what happened.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ..errors import CheckpointError, CorruptStepError, IncompleteStepError, StorageError
from ..tree.leaf_paths import format_leaf_name
from ..tree.records import Record, Slice
from . import digest, file_integrity, orbax
from .catalogue import Entry
from .manifest import require_no_links


def read_verified(entry: Entry, records: Mapping[str, tuple[Record, ...]]) -> orbax.HostArrays:
    """Read leaves of a committed step to the host and compare their digests.

    Raises:
        UntrustedStepError: If a link leads out of the step.
        CorruptStepError: If a leaf differs, naming all such leaves and the damaged files.
        IncompleteStepError: If the step was removed meanwhile.
        StorageError: If the files are intact and still cannot be read.
    """
    if entry.manifest:
        require_no_links(entry.path, entry.manifest.summary)
    try:
        arrays = orbax.read(entry.path, records)
    except orbax.ReadError as error:
        raise _classify_read_error(entry, error) from error
    except MemoryError as error:
        raise StorageError(
            what=f"step {entry.step} needs more host memory than is available: {error}.",
            why="all requested leaves are read to the host and verified before any is replaced.",
            fix="restore single items, or use a larger machine; an untrusted step may claim absurd sizes.",
        ) from error
    damaged = tuple(find_damaged_leaves(records, arrays))
    if damaged:
        count = "1 leaf differs" if len(damaged) == 1 else f"{len(damaged)} leaves differ"
        raise _make_corrupt_error(entry, f"{count} from what was saved", damaged)
    return arrays


def find_damaged_leaves(records: Mapping[str, Sequence[Record]], arrays: orbax.HostArrays) -> Iterator[str]:
    """Yield the names of the leaves whose bytes differ from what was saved."""
    for item, leaves in records.items():
        for record in leaves:
            if record.is_in_orbax and not _is_intact(record, arrays[item][record.path]):
                yield format_leaf_name(item, record.path)


def _is_intact(record: Record, array: np.ndarray[Any, Any]) -> bool:
    if not record.slices:
        return digest.hash_array(digest.get_algorithm(record.digest), array) == record.digest
    return has_full_coverage(record.slices, array.shape) and all(
        digest.hash_array(digest.get_algorithm(mark), array[tuple(slice(*part) for part in where)]) == mark
        for where, mark in record.slices
    )


def has_full_coverage(slices: Sequence[tuple[Slice, str]], shape: Sequence[int]) -> bool:
    """Return whether slices of an array, which never overlap, cover it."""
    places = [where for where, _ in slices]
    inside = all(len(where) == len(shape) and all(b <= n for (_, b), n in zip(where, shape)) for where in places)
    sizes = {where: math.prod(stop - start for start, stop in where) for where, _ in slices}
    return inside and len(sizes) == len(slices) and sum(sizes.values()) == math.prod(shape)


def _make_corrupt_error(entry: Entry, text: str, leaves: tuple[str, ...] = ()) -> CorruptStepError:
    error = CorruptStepError(what=f"step {entry.step} is corrupt: {text}.")
    error.step, error.leaves, error.files = entry.step, leaves, file_integrity.find_damaged_files(entry)
    return error


def _classify_read_error(entry: Entry, error: orbax.ReadError) -> CheckpointError:
    """Return the error that an Orbax failure stands for, decided by the files' digests."""
    if not entry.path.is_dir():
        return IncompleteStepError(what=f"step {entry.step} was removed while it was read.")
    if file_integrity.find_damaged_files(entry):
        return _make_corrupt_error(entry, f"Orbax could not read it ({str(error).partition(':')[0]})")
    return StorageError(
        what=f"step {entry.step} could not be read although its files are intact: {error}",
        why="an older step would fail in the same way, so none was tried; nothing was changed.",
        fix="check the cause above: the disk, its permissions, or the version of Orbax.",
    )
