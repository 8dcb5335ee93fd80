# SPDX-License-Identifier: Apache-2.0
"""`show`: the tree of one step, leaf by leaf, with shapes, dtypes and bytes; no array is read."""

import dataclasses
import math
import os
import pathlib
from collections.abc import Sequence
from typing import Any

from .. import store
from ..errors import CheckpointError, StepNotFoundError
from ..store import catalogue
from ..tree.leaf_paths import format_leaf_name
from ..tree.records import Record, decode_value, get_host_shape


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShownLeaf:
    """One leaf of a step.

    Attributes:
        name: Such as `model.layers.0.kernel`.
        kind: "array", "key", "empty" (an array without elements) or "value".
        shape: Shape of an array.
        dtype: Its dtype; for a key its implementation, for a value its Python type.
        bytes: Bytes of its array.
        value: A plain value.
        weak_type: Whether it is a weakly typed JAX array or scalar. Not compared: older steps do not say it of arrays.
    """

    name: str
    kind: str
    shape: tuple[int, ...] = ()
    dtype: str = ""
    bytes: int = 0
    value: Any = None
    weak_type: bool = dataclasses.field(default=False, compare=False, repr=False)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShownStep:
    """What a step holds.

    Attributes:
        step: Its number.
        state: "committed", "superseded" or "unverified".
        reason: Why it was saved.
        total_bytes: Bytes of its files.
        metrics: Recorded metrics.
        leaves: Every leaf, item by item.
        excluded: The name of each part of the state that was left out, and the type or pattern that names it.
    """

    step: int
    state: str
    reason: str = ""
    total_bytes: int = 0
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)
    leaves: tuple[ShownLeaf, ...] = ()
    excluded: tuple[tuple[str, str], ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Return the step as plain data; values that JSON lacks as strings."""
        plain = dataclasses.asdict(self)
        for leaf in plain["leaves"]:
            if not isinstance(leaf["value"], bool | int | float | str | None):
                leaf["value"] = repr(leaf["value"])
        return plain

    def __str__(self) -> str:
        head = f"step {self.step}: {self.state}, {len(self.leaves)} leaves, {self.total_bytes:,} bytes"
        lines = [f"  {leaf.name}: {format_leaf(leaf)}" for leaf in self.leaves]
        return "\n".join([head, *lines, *(f"  {line}" for line in format_excluded(self.excluded))])


def format_excluded(excluded: Sequence[tuple[str, str]]) -> list[str]:
    """Return one line for each part of the state that was left out."""
    return [f"not saved: {name} ({reason})" for name, reason in excluded]


def format_leaf(leaf: ShownLeaf) -> str:
    """Return a leaf's dtype and shape, or its value, as a string."""
    if leaf.kind == "value":
        return repr(leaf.value) if leaf.dtype else str(leaf.value)
    form = f"{'key ' if leaf.kind == 'key' else ''}{leaf.dtype}[{','.join(map(str, leaf.shape))}]"
    return f"{form}, weakly typed" if leaf.weak_type else form


def find_step(directory: str | os.PathLike[str], step: int | None = None) -> catalogue.Entry:
    """Return a readable step of a run: the newest committed one, or the one of that number.

    Raises:
        StepNotFoundError: If it does not exist.
        StepDamagedError: If it is damaged.
    """
    current = catalogue.scan(pathlib.Path(directory).absolute())
    if step is None:
        newest = max(current.live_entries, key=lambda entry: entry.step, default=None)
        foreign = [entry for entry in current.entries if entry.state == "unverified"]
        found = newest or max(foreign, key=lambda entry: entry.step, default=None)
    else:
        found = next((entry for entry in (*current.entries, *current.moved_entries) if entry.step == step), None)
    if found is None:
        raise StepNotFoundError(
            what=f"{directory} has no {'step that can be read' if step is None else f'step {step}'}.",
            why="nothing was saved there, or retention has deleted it.",
            fix=f"available: {', '.join(str(entry.step) for entry in current.entries) or 'no steps'}.",
        )
    if found.state not in ("committed", "unverified") and found.error is not None:
        raise found.error
    return found


def show(directory: str | os.PathLike[str], step: int | None = None) -> ShownStep:
    """Return the tree of a step; reads its manifest or, for plain Orbax, its metadata, and no array.

    Args:
        directory: The run's directory.
        step: Number of the step; None for the newest.

    Raises:
        StepNotFoundError: If it does not exist.
        StepDamagedError: If its manifest is damaged.

    Example:
        >>> import tempfile
        >>> import ckpttools as ct
        >>> run = tempfile.mkdtemp()
        >>> with ct.open(ct.CheckpointSpec(directory=run, storage=ct.Storage(asynchronous=False))) as ckpt:
        ...     saved = [ckpt.save(step, {"count": step}) for step in (1, 2)]
        >>> [(leaf.name, leaf.value) for leaf in ct.show(run, 1).leaves]
        [('count', 1)]
    """
    entry = find_step(directory, step)
    if entry.manifest is None:
        return _show_foreign_step(entry)
    summary = entry.manifest.summary
    leaves = (
        _make_shown_leaf(item, record)
        for item, stored in entry.manifest.contents.items.items()
        for record in stored.records
    )
    return ShownStep(
        step=entry.step,
        state="superseded" if entry.info and entry.info.superseded else "committed",
        reason=summary.reason,
        total_bytes=summary.total_bytes,
        metrics=dict(summary.metrics),
        leaves=tuple(leaves),
        excluded=entry.manifest.contents.excluded,
    )


def _make_shown_leaf(item: str, record: Record) -> ShownLeaf:
    name = format_leaf_name(item, record.path)
    if record.kind == "value":
        value = decode_value(record.value)
        return ShownLeaf(name=name, kind="value", dtype=type(value).__name__, value=value)
    shape, dtype = get_host_shape(record)
    return ShownLeaf(
        name=name,
        kind=record.kind,
        shape=record.shape,
        dtype=record.dtype,
        bytes=math.prod(shape) * dtype.itemsize,
        weak_type=record.weak_type or record.scalar == "weak",
    )


def _show_foreign_step(entry: catalogue.Entry) -> ShownStep:
    try:
        described: Sequence[tuple[str, tuple[int, ...], str]] = store.orbax.describe_foreign(entry.path)
    except store.orbax.ReadError as error:
        raise CheckpointError(
            what=f"the metadata of step {entry.step} cannot be read: {str(error).rstrip('.')}.",
            why="it was written by plain Orbax, and Orbax cannot read it as named items.",
            fix=f"read {entry.path} with the version of Orbax that wrote it.",
        ) from error
    leaves = tuple(
        ShownLeaf(
            name=name,
            kind="array" if dtype else "value",
            shape=shape,
            dtype=dtype,
            bytes=math.prod(shape) * _get_itemsize(dtype) if dtype else 0,
            value=None if dtype else "(not read)",
        )
        for name, shape, dtype in described
    )
    total = sum(path.stat().st_size for path in entry.path.rglob("*") if path.is_file())
    reason = "written by plain Orbax; ct.adopt adds a manifest"
    return ShownStep(step=entry.step, state="unverified", reason=reason, total_bytes=total, leaves=leaves)


def _get_itemsize(dtype: str) -> int:
    try:
        return get_host_shape(Record(path=(), kind="array", dtype=dtype))[1].itemsize
    except CheckpointError:
        return 0
