# SPDX-License-Identifier: Apache-2.0
"""`show`: the tree of one step, leaf by leaf, with shapes, dtypes and bytes; no array is read."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from .. import store
from ..errors import CheckpointError
from ..sources.open_source import Location, find_step, open_source
from ..store import catalogue, formats
from ..store.formats import foreign_layouts
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
        weak_type: Whether it is a weakly typed JAX array or scalar. Not compared, since older steps do not record it.

    Example:
        >>> import ckpttools as ct
        >>> ct.ShownLeaf(name="model.kernel", kind="array", shape=(2, 3), dtype="float32", bytes=24).shape
        (2, 3)
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
        lineage: The branches that led to the step, each with the step after which it began; the last is its own branch.
        excluded: The name of each part of the state that was excluded, and the type or pattern that excluded it.

    Example:
        >>> import ckpttools as ct
        >>> leaf = ct.ShownLeaf(name="model.kernel", kind="array", shape=(2, 3), dtype="float32", bytes=24)
        >>> print(ct.ShownStep(step=500, state="committed", total_bytes=24, leaves=(leaf,)))
        step 500: committed, 1 leaves, 24 bytes
          model.kernel: float32[2,3]
    """

    step: int
    state: str
    reason: str = ""
    total_bytes: int = 0
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)
    leaves: tuple[ShownLeaf, ...] = ()
    lineage: tuple[tuple[str, int], ...] = ()
    excluded: tuple[tuple[str, str], ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Return the step as plain data; values that JSON lacks as strings."""
        plain = dataclasses.asdict(self)
        for leaf in plain["leaves"]:
            if not isinstance(leaf["value"], bool | int | float | str | None):
                leaf["value"] = repr(leaf["value"])
        return plain

    def __str__(self) -> str:
        head = [f"step {self.step}: {self.state}, {len(self.leaves)} leaves, {self.total_bytes:,} bytes"]
        head += [f"lineage: {format_lineage(self.lineage)}"] if self.lineage else []
        lines = [*(f"{leaf.name}: {format_leaf(leaf)}" for leaf in self.leaves), *format_excluded(self.excluded)]
        return "\n".join([*head, *(f"  {line}" for line in lines)])


def format_lineage(lineage: Sequence[tuple[str, int]]) -> str:
    """Return the branches that led to a step as a string, the first one first.

    Example:
        >>> format_lineage([("f681b1dc", 0), ("b578ad0b", 1000)])
        'branch f681b1dc, branch b578ad0b after step 1000'
    """
    return ", ".join(f"branch {name}" + (f" after step {start}" if start else "") for name, start in lineage)


def format_excluded(excluded: Sequence[tuple[str, str]]) -> list[str]:
    """Return one line for each part of the state that was excluded."""
    return [f"not saved: {name} ({reason})" for name, reason in excluded]


def format_leaf(leaf: ShownLeaf) -> str:
    """Return a leaf's dtype and shape, or its value, as a string."""
    if leaf.kind == "value":
        return repr(leaf.value) if leaf.dtype else str(leaf.value)
    form = f"{'key ' if leaf.kind == 'key' else ''}{leaf.dtype}[{','.join(map(str, leaf.shape))}]"
    return f"{form}, weakly typed" if leaf.weak_type else form


def show(directory: Location, step: int | None = None) -> ShownStep:
    """Return the tree of a step; reads its manifest or, for plain Orbax, its metadata, and no array.

    Args:
        directory: The directory of a run or of one step, or a mirror or its address.
        step: Number of the step; None for the newest.

    Raises:
        StepNotFoundError: If it does not exist.
        StepDamagedError: If its manifest is damaged.
        NotARunError: If the directory does not exist, or is a file or part of a step.

    Example:
        >>> import tempfile
        >>> import ckpttools as ct
        >>> run = tempfile.mkdtemp()
        >>> with ct.open(ct.CheckpointSpec(directory=run, storage=ct.Storage(asynchronous=False))) as ckpt:
        ...     saved = [ckpt.save(step, {"count": step}) for step in (1, 2)]
        >>> [(leaf.name, leaf.value) for leaf in ct.show(run, 1).leaves]
        [('count', 1)]
    """
    with open_source(directory) as source:
        entry = find_step(source, step)
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
        lineage=summary.lineage,
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
    is_file = entry.path.is_file()
    try:
        described: Sequence[tuple[str, tuple[int, ...], str]] = (
            formats.flax_msgpack.describe(entry.path) if is_file else store.orbax.describe_foreign(entry.path)
        )
    except store.orbax.ReadError as error:
        raise CheckpointError(
            what=f"the metadata of step {entry.step} cannot be read: {str(error).rstrip('.')}.",
            why="it was written by plain Orbax, which cannot read it either.",
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
    files = [entry.path] if is_file else entry.path.rglob("*")
    total = sum(path.stat().st_size for path in files if path.is_file())
    reason = f"foreign: written by {foreign_layouts.describe_writer(entry.path)}; ct.adopt adds a manifest"
    return ShownStep(step=entry.step, state="unverified", reason=reason, total_bytes=total, leaves=leaves)


def _get_itemsize(dtype: str) -> int:
    try:
        return get_host_shape(Record(path=(), kind="array", dtype=dtype))[1].itemsize
    except CheckpointError:
        return 0
