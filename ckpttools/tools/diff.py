# SPDX-License-Identifier: Apache-2.0
"""`diff`: compare two steps, of one run or of two: missing and added leaves, other shapes or dtypes, other values.

Leaves of equal digest are equal and are not read, so two steps of a run with frozen weights are compared in the time
that the trained weights take. The rest is read and verified in batches; the host holds at most two of them.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from remattools.text import format_table

from ..errors import CheckpointError
from ..sources.open_source import Location, find_step, open_source
from ..store import leaf_integrity
from ..store.catalogue import Entry
from ..store.formats.foreign_layouts import describe_writer
from ..tree.leaf_paths import Names, to_names
from ..tree.records import Record, count_host_bytes, decode_value, format_form

_BATCH_BYTES = 256 << 20
_MAX_ROWS = 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChangedLeaf:
    """A leaf of both steps with other values, or another shape, dtype or kind.

    Attributes:
        name: Such as `model.layers.0.kernel`.
        before: Dtype and shape in the first step, or the value.
        after: The same in the second.
        max_abs: Largest absolute difference of two elements; None if shape or dtype differ or it is not numeric.
        relative: Norm of the difference over the norm in the first step; infinite if that is zero.
        changed: Number of elements that differ.

    Example:
        >>> import ckpttools as ct
        >>> ct.ChangedLeaf(name="model.bias", before="float32[3]", after="float32[3]", max_abs=0.5, changed=1).max_abs
        0.5
    """

    name: str
    before: str
    after: str
    max_abs: float | None = None
    relative: float | None = None
    changed: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiffReport:
    """The differences of two steps.

    Attributes:
        a: Directory of the first step.
        b: Directory of the second step.
        removed: Leaves that only the first step has.
        added: Leaves that only the second step has.
        reformed: Leaves of another shape, dtype or kind.
        changed: Leaves of equal shape and dtype with other values, the largest relative change first.
        equal: Number of leaves that are equal bit for bit.

    Example:
        >>> import ckpttools as ct
        >>> report = ct.DiffReport(a="runs/a/1", b="runs/b/1", added=("model.bias",), equal=1)
        >>> report.same
        False
        >>> print(report)
        runs/a/1 and runs/b/1: 1 leaves equal, 0 changed, 0 of another form, 0 removed, 1 added
        + model.bias
    """

    a: str
    b: str
    removed: tuple[str, ...] = ()
    added: tuple[str, ...] = ()
    reformed: tuple[ChangedLeaf, ...] = ()
    changed: tuple[ChangedLeaf, ...] = ()
    equal: int = 0

    @property
    def same(self) -> bool:
        """Whether both steps hold the same bits under the same names."""
        return not (self.removed or self.added or self.reformed or self.changed)

    def as_dict(self) -> dict[str, Any]:
        """Return the report as plain data."""
        return {**dataclasses.asdict(self), "same": self.same}

    def __str__(self) -> str:
        head = f"{self.a} and {self.b}: {self.equal} leaves equal, {len(self.changed)} changed"
        lines = [head + f", {len(self.reformed)} of another form, {len(self.removed)} removed, {len(self.added)} added"]
        lines += [f"- {name}" for name in self.removed] + [f"+ {name}" for name in self.added]
        lines += [f"! {leaf.name}: {leaf.before} to {leaf.after}" for leaf in self.reformed]
        if self.changed:
            columns = ["leaf", "form", "max abs", "relative", "elements"]
            rows = [_format_row(leaf) for leaf in self.changed[:_MAX_ROWS]]
            lines.append(format_table(columns, rows, numeric=columns[2:]))
        if len(self.changed) > _MAX_ROWS:
            lines.append(f"... and {len(self.changed) - _MAX_ROWS} smaller changes")
        return "\n".join(lines)


def diff(
    a: Location,
    b: Location,
    *,
    steps: tuple[int | None, int | None] = (None, None),
    progress: Callable[[int, int], None] | None = None,
) -> DiffReport:
    """Compare two steps: their structure, and the values of the leaves that both have.

    Args:
        a: The directory of a run (its newest step is used) or of one step, or a mirror or its address.
        b: The same for the second step.
        steps: Numbers of the steps, where `a` and `b` are runs.
        progress: Called with the bytes compared so far and the bytes of all leaves whose digests differ.

    Raises:
        StepNotFoundError: If a step does not exist.
        StepDamagedError: If a step is damaged.

    Example:
        >>> import tempfile
        >>> import ckpttools as ct
        >>> run = tempfile.mkdtemp()
        >>> with ct.open(ct.CheckpointSpec(directory=run, storage=ct.Storage(asynchronous=False))) as ckpt:
        ...     saved = [ckpt.save(step, {"count": step}) for step in (1, 2)]
        >>> report = ct.diff(run, run, steps=(1, 2))
        >>> [(leaf.name, leaf.before, leaf.after) for leaf in report.changed]
        [('count', '1', '2')]
    """
    with _open_entry(a, steps[0]) as first, _open_entry(b, steps[1]) as second:
        return _compare(first, second, progress)


def _compare(first: Entry, second: Entry, progress: Callable[[int, int], None] | None) -> DiffReport:
    left, right = _collect_records(first), _collect_records(second)
    both = [path for path in left if path in right]
    pairs = [(path, left[path], right[path]) for path in both]
    alike = [pair for pair in pairs if _has_same_form(pair[1][1], pair[2][1])]
    reformed = [pair for pair in pairs if not _has_same_form(pair[1][1], pair[2][1])]
    other = [pair for pair in alike if not _has_same_digest(pair[1][1], pair[2][1])]
    found = [leaf for leaf in _compare_leaves(first, second, other, progress) if leaf is not None]
    return DiffReport(
        a=str(first.path),
        b=str(second.path),
        removed=tuple(_format_name(path) for path in left if path not in right),
        added=tuple(_format_name(path) for path in right if path not in left),
        reformed=tuple(
            ChangedLeaf(name=_format_name(path), before=format_form(old), after=format_form(new))
            for path, (_, old), (_, new) in reformed
        ),
        changed=tuple(sorted(found, key=_get_sort_key, reverse=True)),
        equal=len(alike) - len(found),
    )


type ItemRecord = tuple[str, Record]
"""An item and one of its leaves."""
type RecordPair = tuple[Names, ItemRecord, ItemRecord]


@contextlib.contextmanager
def _open_entry(location: Location, step: int | None) -> Iterator[Entry]:
    with open_source(location) as source:
        entry = find_step(source, step)
        if entry.manifest is None:
            raise CheckpointError(
                what=f"step {entry.step} of {source.name} was written by {describe_writer(entry.path)} and has no "
                "manifest.",
                why="two steps are compared by their manifests and digests.",
                fix=source.fix,
            )
        yield entry


def _collect_records(entry: Entry) -> dict[Names, ItemRecord]:
    items = entry.manifest.contents.items if entry.manifest else {}
    return {
        (item, *to_names(record.path)): (item, record) for item, stored in items.items() for record in stored.records
    }


def _has_same_form(old: Record, new: Record) -> bool:
    return (old.kind, old.shape, old.dtype) == (new.kind, new.shape, new.dtype)


def _has_same_digest(old: Record, new: Record) -> bool:
    """Return whether two leaves are known to be equal without reading them; digests of two algorithms say nothing."""
    if not old.is_in_orbax:
        return bool(old.value == new.value)
    return (old.digest, old.slices) == (new.digest, new.slices)


def _compare_leaves(
    first: Entry, second: Entry, pairs: Sequence[RecordPair], progress: Callable[[int, int], None] | None
) -> Iterator[ChangedLeaf | None]:
    total, done = count_host_bytes(pair[1][1] for pair in pairs), 0
    for batch in _split_batches(pairs):
        old = _read(first, [pair[1] for pair in batch])
        new = _read(second, [pair[2] for pair in batch])
        done += count_host_bytes(pair[1][1] for pair in batch)
        if progress is not None:
            progress(done, total)
        for path, (_, before), (_, after) in batch:
            if before.is_in_orbax:
                yield _compare_arrays(path, before, old.pop(path), new.pop(path))
            else:
                values = repr(decode_value(before.value)), repr(decode_value(after.value))
                yield ChangedLeaf(name=_format_name(path), before=values[0][:80], after=values[1][:80])


def _split_batches(pairs: Sequence[RecordPair]) -> Iterator[list[RecordPair]]:
    batch: list[RecordPair] = []
    total = 0
    for pair in pairs:
        size = count_host_bytes([pair[1][1]])
        if batch and total + size > _BATCH_BYTES:
            yield batch
            batch, total = [], 0
        batch.append(pair)
        total += size
    if batch:
        yield batch


def _read(entry: Entry, leaves: Sequence[ItemRecord]) -> dict[Names, np.ndarray[Any, Any]]:
    if entry.fetch is not None:
        entry.fetch()
    records_by_item: dict[str, list[Record]] = {}
    for item, record in leaves:
        if record.is_in_orbax:
            records_by_item.setdefault(item, []).append(record)
    arrays: Mapping[str, Mapping[Any, Any]] = leaf_integrity.read_verified(
        entry, {k: tuple(v) for k, v in records_by_item.items()}
    )
    return {(item, *to_names(path)): array for item, found in arrays.items() for path, array in found.items()}


def _compare_arrays(
    path: Names, record: Record, old: np.ndarray[Any, Any], new: np.ndarray[Any, Any]
) -> ChangedLeaf | None:
    """Return how two arrays of one shape and dtype differ; None if they are equal bit for bit."""
    if old.tobytes() == new.tobytes():
        return None
    shown = format_form(record)
    if record.kind == "key":
        return ChangedLeaf(name=_format_name(path), before=shown, after=shown)
    count = int(np.count_nonzero(old != new))
    wide = np.complex128 if old.dtype.kind == "c" else np.float64
    with np.errstate(all="ignore"):
        before = old.astype(wide)
        delta = new.astype(wide) - before
        norm, base = float(np.linalg.norm(delta)), float(np.linalg.norm(before))
        largest = float(np.abs(delta).max(initial=0.0))
    relative = norm / base if base else (math.inf if norm else 0.0)
    return ChangedLeaf(
        name=_format_name(path), before=shown, after=shown, max_abs=largest, relative=relative, changed=count
    )


def _get_sort_key(leaf: ChangedLeaf) -> float:
    """Return the key that changes are sorted by: leaves that became NaN first, those that are not numeric last."""
    if leaf.relative is None:
        return -1.0
    return math.inf if math.isnan(leaf.relative) else leaf.relative


def _format_row(leaf: ChangedLeaf) -> list[str]:
    if leaf.max_abs is None or leaf.relative is None:
        same = leaf.before == leaf.after
        return [leaf.name, leaf.before if same else f"{leaf.before} to {leaf.after}", "", "", ""]
    return [leaf.name, leaf.before, f"{leaf.max_abs:.3g}", f"{leaf.relative:.3g}", str(leaf.changed)]


def _format_name(path: Names) -> str:
    return ".".join(path)
