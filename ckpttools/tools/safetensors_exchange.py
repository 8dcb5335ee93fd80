# SPDX-License-Identifier: Apache-2.0
"""Export and import weights as safetensors files, leaf by leaf.

The format knows arrays and strings. Typed keys are stored as their data and plain values as strings, each with an entry
in the file's metadata by which they come back as what they were; other readers ignore those entries.
"""

import json
import os
import pathlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from remattools.rules.paths import Pattern

from ..errors import CheckpointError, LeafError, SpecError, StructureError, suggest_names
from ..store import layout, leaf_integrity, safetensors_format
from ..store.catalogue import Entry
from ..store.safetensors_format import CODES, Tensor
from ..tree import flatten, snapshot
from ..tree.leaf_paths import Path
from ..tree.leaf_paths import to_names as names_of
from ..tree.leaves import describe
from ..tree.records import Record, count_host_bytes, decode_value, get_host_shape, parse_dtype
from ..tree.write_back import HostItem, fill_state
from .show import find_step

type NameMap = Mapping[str, str]
"""Names of leaves to names of tensors; `*` matches one segment and `**` any number, on both sides."""

_BATCH_BYTES = 256 << 20
KEY, VALUE = "ckpttools.key.", "ckpttools.value."


def export_safetensors(
    source: Any,
    file: str | os.PathLike[str],
    *,
    item: str = "model",
    names: NameMap | None = None,
    skip: Sequence[str] = (),
    metadata: Mapping[str, str] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[str, ...]:
    """Write the leaves of a stored step, or of a live model, to a safetensors file.

    Args:
        source: Directory of a run (its newest step is used) or of one step, or a state: an nnx module, an
            `nnx.State`, a pytree of arrays.
        file: The file; an existing one is replaced.
        item: Which item of the step.
        names: Names of leaves in the file, such as `{"layers.*.kernel": "h.*.weight"}`; all others keep their path.
        skip: Patterns of leaves to leave out.
        metadata: Strings for the header; by default the format "pt", which transformers requires.
        progress: Called with the bytes written so far and the bytes in total.

    Returns:
        The names of the tensors.

    Raises:
        LeafError: If a leaf has a dtype that the format lacks.
        StructureError: If two leaves would have the same name.
        StepDamagedError: If the step is damaged.
        StorageError: If the disk refused.
    """
    if isinstance(source, str | os.PathLike):
        records, load, note = _open_step(pathlib.Path(source), item)
    else:
        records, load, note = _open_state(source, item)
    records = exclude_skipped(records, skip)
    named = name_leaves(records, names)
    tensors = {name: _make_tensor(item, record) for name, record in named.items() if record.kind != "value"}
    total, done = count_host_bytes(named.values()), 0

    def load_batch(batch: Sequence[str]) -> dict[str, np.ndarray[Any, Any]]:
        nonlocal done
        loaded = load([named[name] for name in batch if named[name].is_in_orbax])
        done += count_host_bytes(named[name] for name in batch)
        if progress is not None:
            progress(done, total)
        return {name: loaded.get(named[name].path, np.empty(*get_host_shape(named[name]))) for name in batch}

    header = {"format": "pt"} if metadata is None else dict(metadata)
    header |= {KEY + name: record.dtype for name, record in named.items() if record.kind == "key"}
    header |= {VALUE + name: json.dumps(record.value) for name, record in named.items() if record.kind == "value"}
    safetensors_format.write(pathlib.Path(file), tensors, load_batch, {**note, **header}, batch_bytes=_BATCH_BYTES)
    return tuple(tensors)


type LoadArrays = Callable[[Sequence[Record]], Mapping[Path, np.ndarray[Any, Any]]]


def _open_step(directory: pathlib.Path, item: str) -> tuple[tuple[Record, ...], LoadArrays, dict[str, str]]:
    step = layout.parse_step_number(directory.absolute().name)
    is_step = step is not None and any(
        (directory / name).exists() for name in (layout.MANIFEST, "_CHECKPOINT_METADATA")
    )
    entry: Entry = find_step(directory.absolute().parent, step) if is_step else find_step(directory)
    if entry.manifest is None:
        raise CheckpointError(
            what=f"step {entry.step} was written by plain Orbax and has no manifest.",
            why="exported leaves are verified by the digests in the manifest.",
            fix="ct.adopt(directory) adds one.",
        )
    stored = entry.manifest.contents.items
    if item not in stored:
        raise StructureError(
            what=f"step {entry.step} has no item {item!r}.",
            why=f"it holds {', '.join(stored) or 'nothing'}.",
            fix=suggest_names(item, stored) or f"item={next(iter(stored), 'model')!r}",
        )

    def load(records: Sequence[Record]) -> Mapping[Path, np.ndarray[Any, Any]]:
        return leaf_integrity.read_verified(entry, {item: tuple(records)})[item] if records else {}

    return stored[item].records, load, {"ckpttools.step": str(entry.step)}


def _open_state(state: Any, item: str) -> tuple[tuple[Record, ...], LoadArrays, dict[str, str]]:
    taken = snapshot.take({item: state}, None).items[item]
    return taken.records, lambda records: taken.host_arrays, {}


def _make_tensor(item: str, record: Record) -> Tensor:
    shape, dtype = get_host_shape(record)
    if dtype.name not in CODES:
        raise LeafError(
            what=f"{format_tensor_name(item, record)} is of dtype {dtype.name}, which safetensors does not have.",
            why="storing it as another dtype would change its meaning for every reader.",
            fix=f"leave it out with skip=({format_tensor_name('', record)!r},), or cast it to one of {', '.join(CODES)}.",
        )
    return Tensor(dtype.name, shape)


def format_tensor_name(item: str, record: Record) -> str:
    """Return a leaf's path as a string, preceded by the item if there is one."""
    return ".".join([*([item] if item else []), *map(str, record.path)])


def import_safetensors(
    file: str | os.PathLike[str],
    state: Any,
    *,
    names: NameMap | None = None,
    skip: Sequence[str] = (),
    allow_extra: bool = False,
) -> Any:
    """Fill a state from a safetensors file; shapes and dtypes must be those of the state.

    Args:
        file: The file.
        state: An nnx module (filled in place), an `nnx.State` or a pytree of arrays.
        names: Names of the leaves in the file, as for `export_safetensors`.
        skip: Patterns of leaves that stay as they are.
        allow_extra: Whether the file may hold tensors that the state lacks.

    Returns:
        The filled state: `state` itself if it is a live object.

    Raises:
        TensorFileError: If it is not a whole safetensors file.
        StructureError: If it does not fit; the state is unchanged, and every difference is listed.
    """
    path = pathlib.Path(file)
    tensors, header = safetensors_format.read_header(path)
    flat = flatten.flatten_item(state, template=True)
    if flat.skeletons:
        raise StructureError(
            what="the state holds objects with get_state and set_state.",
            why="a safetensors file holds arrays only.",
            fix="pass the model without its data iterator.",
        )
    records = tuple(describe("", leaf) for leaf in flat.leaves)
    wanted = name_leaves(exclude_skipped(records, skip), names)
    lines, placed = [], {}
    for name, record in wanted.items():
        placed[record.path], line = _match_leaf(name, record, tensors, header)
        lines += [line] if line else []
    extra = [name for name in tensors if name not in wanted]
    lines += [] if allow_extra else [f"{name}: in the file, not in the state" for name in extra]
    if lines:
        raise _make_mismatch_error(path, lines, extra)
    source = {record.path: tensors[name] for name, record in wanted.items() if name in tensors}
    arrays = _LazyArrays(path, source, _take_arrays(state, [each for each in records if each.path not in placed]))
    used = [placed.get(record.path, record) for record in records]
    filled = HostItem(
        records={names_of(record.path): record for record in used}, restored_records=used, skeletons={}, arrays=arrays
    )
    return fill_state({"state": state}, {"state": filled})["state"]


class _LazyArrays(dict[Path, np.ndarray[Any, Any]]):
    """Arrays that are read when they are popped, so that the host holds one at a time."""

    def __init__(self, file: pathlib.Path, tensors: Mapping[Path, Tensor], arrays: Mapping[Path, Any]) -> None:
        super().__init__(arrays)
        self._file, self._tensors = file, tensors

    def pop(self, path: Path) -> np.ndarray[Any, Any]:  # type: ignore[override]
        """Read and return the array of a leaf; each is requested once."""
        return safetensors_format.read(self._file, self._tensors[path]) if path in self._tensors else super().pop(path)


def _take_arrays(state: Any, records: Sequence[Record]) -> dict[Path, np.ndarray[Any, Any]]:
    if not records:
        return {}
    arrays = snapshot.take({"state": state}, None).items["state"].host_arrays
    return {record.path: arrays[record.path] for record in records if record.is_in_orbax}


def _match_leaf(
    name: str, record: Record, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> tuple[Record, str | None]:
    """Return the record of a leaf's tensor in the file, and a line that says why it does not fit; "" if it does."""
    if record.kind == "value":
        return read_value(name, record, metadata)
    if name not in tensors:
        near = suggest_names(name, tensors)
        return record, f"{name}: not in the file{'; ' + near if near.startswith('did') else ''}"
    shape, dtype = get_host_shape(record)
    found = tensors[name]
    if (found.shape, parse_dtype(found.dtype)) != (shape, dtype):
        here = f"{dtype.name}[{','.join(map(str, shape))}]"
        return record, f"{name}: {found.dtype}[{','.join(map(str, found.shape))}] in the file, {here} in the state"
    return record, None


def read_value(name: str, record: Record, metadata: Mapping[str, str]) -> tuple[Record, str | None]:
    """Return a plain value from the file's metadata; foreign files have none, and the state keeps its own."""
    text = metadata.get(VALUE + name)
    if text is None:
        return record, None
    try:
        encoded = json.loads(text)
        decode_value(encoded)
    except (ValueError, RecursionError) as error:
        return record, f"{name}: the value in the file cannot be read ({error})"
    return Record(path=record.path, kind="value", value=encoded), None


def _make_mismatch_error(path: pathlib.Path, lines: Sequence[str], extra: Sequence[str]) -> StructureError:
    shown = "".join(f"\n    {line}" for line in lines[:40])
    error = StructureError(
        what=f"{path} does not fit the state:{shown}" + ("\n    ..." if len(lines) > 40 else ""),
        why="nothing was changed; shapes and dtypes must be equal.",
        fix="names={...} renames, skip=(...) keeps leaves of the state" + (", allow_extra=True" if extra else "") + ".",
    )
    error.mismatches = tuple(lines)
    return error


def exclude_skipped(records: Iterable[Record], skip: Sequence[str]) -> tuple[Record, ...]:
    """Return the leaves that no pattern of `skip` matches.

    Raises:
        SpecError: If a pattern matches no leaf.
    """
    given, left = (skip,) if isinstance(skip, str) else tuple(skip), tuple(records)
    for text in given:
        pattern = Pattern.parse(text)
        skipped = {record.path for record in left if pattern.is_match(record.path)}
        if not skipped:
            raise SpecError(
                what=f"skip={text!r} matches no leaf.",
                why="a mistyped pattern would silently leave nothing out.",
                fix=suggest_names(text, [format_tensor_name("", record) for record in left]),
            )
        left = tuple(record for record in left if record.path not in skipped)
    return left


def name_leaves(records: Iterable[Record], names: NameMap | None) -> dict[str, Record]:
    """Return leaves by the names of their tensors."""
    rules = [(_compile_pattern(pattern), pattern, target) for pattern, target in (names or {}).items()]
    unused = {pattern for _, pattern, _ in rules}
    found: dict[str, Record] = {}
    for record in records:
        name = format_tensor_name("", record) or "value"
        for regex, pattern, target in rules:
            if match := regex.fullmatch(name):
                unused.discard(pattern)
                name = _substitute(pattern, target, match)
                break
        if name in found:
            raise StructureError(
                what=f"two leaves have the name {name!r}: {format_tensor_name('', found[name])} and "
                f"{format_tensor_name('', record)}.",
                why="a file holds one tensor under each name.",
                fix="rename one of them with names={...}.",
            )
        found[name] = record
    if unused:
        raise SpecError(
            what=f"names has {', '.join(map(repr, sorted(unused)))}, which match no leaf.",
            why="a mistyped name would silently leave its leaf under the old one.",
            fix=suggest_names(min(unused), [format_tensor_name("", record) for record in found.values()]),
        )
    return found


def _compile_pattern(pattern: str) -> re.Pattern[str]:
    parts = re.split(r"(\*\*|\*)", pattern)
    return re.compile("".join({"*": r"([^.]*)", "**": r"(.*)"}.get(part, re.escape(part)) for part in parts))


def _substitute(pattern: str, target: str, match: re.Match[str]) -> str:
    parts = re.split(r"\*\*|\*", target)
    if len(parts) - 1 != len(match.groups()):
        raise SpecError(
            what=f"names={{{pattern!r}: {target!r}}} has {len(match.groups())} and {len(parts) - 1} stars.",
            why="each star on the right stands for what the star in its place on the left matched.",
            fix="write as many stars on both sides.",
        )
    return "".join(part for pair in zip(parts, (*match.groups(), "")) for part in pair)
