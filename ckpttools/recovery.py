# SPDX-License-Identifier: Apache-2.0
"""Find a step that can be restored, prove it, and only then touch the live state.

Candidates are tried from the newest to the oldest. Damage (incomplete, corrupt) is passed over and reported; a
structure that does not fit and a disk that does not answer are raised, because the next candidate would not help. A
directory that holds steps and none intact raises: it never looks like a fresh start.

All leaves are read to the host and their digests compared before the first live leaf is replaced. After that, leaf by
leaf, the host copy moves to the device and the old array is freed, so that the device holds the state and one leaf.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from .errors import (
    CheckpointError,
    CorruptStepError,
    IncompleteStepError,
    NoIntactStepError,
    StepDamagedError,
    StepNotFoundError,
    StorageError,
)
from .report import Candidate, RestoreReport
from .spec.retention import ranked
from .state import tree
from .state.leaves import Path, Record, decode_value, dotted, is_array, numpy_dtype
from .state.match import absent_item, differences, require_match
from .store import commit, digest, manifest, orbax
from .store.catalogue import Catalogue, Entry


@dataclasses.dataclass(frozen=True)
class BestStep:
    """Asks `restore` for the step with the best value of a metric; made by `ct.best`."""

    metric: str
    mode: Literal["min", "max"] | None = None


type Selector = Literal["latest"] | int | BestStep


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A step whose bytes were proved intact, on the host."""

    entry: Entry
    manifest: manifest.Manifest
    arrays: orbax.HostArrays


def order(catalogue: Catalogue, selector: Selector) -> list[Entry]:
    """The candidates for a selector, the one to try first in front."""
    if isinstance(selector, int):
        return _numbered(catalogue, selector)
    if isinstance(selector, BestStep):
        return _best(catalogue, selector)
    live = {entry.path for entry in catalogue.live}
    tried = [entry for entry in catalogue.entries if entry.path in live or entry.state != "committed"]
    # Damaged steps have no readable sequence, so they stand where their number puts them.
    return sorted(tried, key=lambda entry: entry.step, reverse=True)


def _numbered(catalogue: Catalogue, step: int) -> list[Entry]:
    found = [entry for entry in (*catalogue.entries, *catalogue.set_aside) if entry.step == step]
    if not found:
        raise StepNotFoundError(
            what=f"there is no step {step}.",
            why="it was never saved, or retention has deleted it.",
            fix=f"there are {', '.join(str(entry.step) for entry in catalogue.entries) or 'no steps'}.",
        )
    return found[:1]


def _best(catalogue: Catalogue, selector: BestStep) -> list[Entry]:
    entries = {entry.info.sequence: entry for entry in catalogue.live if entry.info}
    best = ranked([entry.info for entry in entries.values() if entry.info], selector.metric, selector.mode or "min")
    if not best:
        names = sorted({name for entry in entries.values() if entry.info for name in entry.info.metrics})
        raise StepNotFoundError(
            what=f"no step has recorded the metric {selector.metric!r}.",
            why="the best step is chosen by the metrics that were passed along with the steps.",
            fix=f"recorded: {', '.join(names) or 'none'}.",
        )
    return [entries[info.sequence] for info in best]


def load_first_intact(
    candidates: Sequence[Entry],
    state: Mapping[str, Any],
    *,
    check: Callable[[Loaded], None],
    quarantine_in: pathlib.Path | None,
) -> tuple[Loaded | None, list[Candidate]]:
    """The first candidate whose bytes are proved, and the record of all that were tried.

    Args:
        candidates: Steps in the order in which they are tried.
        state: The template.
        check: A further check on the loaded step; raises `StepDamagedError` to reject it.
        quarantine_in: The run's folder, if damaged steps may be moved out of the way.

    Raises:
        StructureError: If an intact step does not fit the template.
        StorageError: If the disk does not answer.
    """
    templates = {item: tree.flatten(value, template=True) for item, value in state.items()}
    tried: list[tuple[Entry, Candidate]] = []
    for entry in candidates:
        try:
            loaded = load(entry, templates)
            check(loaded)
        except StepDamagedError as error:
            tried.append((entry, _rejected(entry, error)))
            continue
        # Only now: with nothing intact all stays where it is, or the next start would find an empty directory.
        moved = [_quarantined(damaged, candidate, quarantine_in) for damaged, candidate in tried]
        return loaded, [*moved, Candidate(step=entry.step, verdict="used")]
    return None, [candidate for _, candidate in tried]


def load(entry: Entry, templates: Mapping[str, tree.Flat]) -> Loaded:
    """Read the items of one step that the templates ask for, and prove every byte of them."""
    if entry.manifest is None:
        raise entry.error or IncompleteStepError(what=f"step {entry.step} has no manifest.")
    contents = entry.manifest.contents
    lines = []
    for item, template in templates.items():
        if item in contents.items:
            stored = contents.items[item]
            lines += differences(item, template, stored.records, stored.skeletons)
        else:
            lines.append(absent_item(item, contents.items))
    require_match(entry.step, lines)
    records = {item: contents.items[item].records for item in templates}
    try:
        arrays = orbax.read(entry.path, records)
    except orbax.ReadError as error:
        raise _classified(entry, error) from error
    damaged = tuple(_damaged_leaves(records, arrays))
    if damaged:
        raise _damage(entry, f"{len(damaged)} leaf or leaves differ from what was saved", damaged)
    return Loaded(entry, entry.manifest, arrays)


def _damaged_leaves(records: Mapping[str, Sequence[Record]], arrays: orbax.HostArrays) -> Iterator[str]:
    for item, leaves in records.items():
        for record in leaves:
            if record.in_orbax:
                found = digest.of_array(digest.algorithm_of(record.digest), arrays[item][record.path])
                if found != record.digest:
                    yield dotted(item, record.path)


def damaged_files(entry: Entry) -> tuple[str, ...]:
    """Files of a committed step whose bytes are not those that were written; reads all of them."""
    damaged = []
    for name, (_, expected) in entry.manifest.summary.files.items() if entry.manifest else ():
        try:
            if digest.of_file(digest.algorithm_of(expected), entry.path / name) != expected:
                damaged.append(name)
        except (FileNotFoundError, NotADirectoryError):
            damaged.append(name)
        except OSError as error:
            raise StorageError(
                what=f"{entry.path / name} cannot be read: {error}.",
                why="that is the disk or its permissions, not damage: an older step would meet the same trouble.",
                fix="mend the cause and restore again; nothing was changed.",
            ) from error
    return tuple(damaged)


def _damage(entry: Entry, text: str, leaves: tuple[str, ...] = ()) -> CorruptStepError:
    error = CorruptStepError(what=f"step {entry.step} is corrupt: {text}.")
    error.step, error.leaves, error.files = entry.step, leaves, damaged_files(entry)
    return error


def _classified(entry: Entry, error: orbax.ReadError) -> CheckpointError:
    """What an error of Orbax means: the files tell, whatever type of exception came."""
    if not entry.path.is_dir():
        return IncompleteStepError(what=f"step {entry.step} was removed while it was read.")
    if damaged_files(entry):
        return _damage(entry, f"Orbax could not read it ({str(error).partition(':')[0]})")
    return StorageError(
        what=f"step {entry.step} could not be read though its files are as they were written: {error}",
        why="an older step would meet the same trouble, so none was tried; nothing was changed.",
        fix="look at the cause above: the disk, its permissions, or the version of Orbax.",
    )


def _rejected(entry: Entry, error: StepDamagedError) -> Candidate:
    if entry.state == "unverified":
        reason = "written by plain Orbax and never proved; ct.adopt(directory) takes it over"
        return Candidate(step=entry.step, verdict="unverified", reason=reason)
    if entry.path.is_dir() and not any(entry.path.iterdir()):
        return Candidate(step=entry.step, verdict="empty", reason="an empty folder, never a step")
    return Candidate(
        step=entry.step,
        verdict="incomplete" if isinstance(error, IncompleteStepError) else "corrupt",
        reason=error.what,
        leaves=error.leaves,
        files=error.files,
    )


def _quarantined(entry: Entry, candidate: Candidate, quarantine_in: pathlib.Path | None) -> Candidate:
    damaged = candidate.verdict in ("incomplete", "corrupt")
    if quarantine_in is None or not damaged or not entry.path.exists():
        return candidate
    return dataclasses.replace(candidate, moved_to=commit.quarantine(quarantine_in, entry.path))


def place_on_device(loaded: Loaded, state: Mapping[str, Any]) -> dict[str, Any]:
    """Replace the state's leaves by those of a proved step, one by one; returns the whole state."""
    flat = {item: tree.flatten(value, template=True).skeletons for item, value in state.items()}
    # Objects that take their state back themselves come first: should one of them refuse, the model is untouched.
    ordered = sorted(state, key=lambda item: () not in flat[item])
    filled = {item: _fill_item(item, state[item], loaded, flat[item]) for item in ordered}
    return {item: filled[item] for item in state}


def _fill_item(item: str, value: Any, loaded: Loaded, template_skeletons: Mapping[Path, Any]) -> Any:
    stored = loaded.manifest.contents.items[item]
    arrays = loaded.arrays[item]
    records = {record.path: record for record in stored.records}

    def on_host(record: Record) -> Any:
        if record.kind == "value":
            return decode_value(record.value)
        array = arrays.pop(record.path) if record.in_orbax else np.zeros(record.shape, numpy_dtype(record.dtype))
        if record.kind == "key":
            return jax.random.wrap_key_data(jnp.asarray(array), impl=record.dtype)
        return array[()] if record.scalar == "numpy" else array

    def place(path: Path, template: Any) -> Any:
        record = records[path]
        host = on_host(record)
        if record.kind == "value" or isinstance(template, np.ndarray | np.generic):
            return host
        if record.scalar == "weak":
            host = host.item()
        if not is_array(template):
            return jnp.asarray(host)
        # An array that was free to follow others must not come back tied to a device.
        return jax.device_put(host, template.sharding if getattr(template, "committed", True) else None)

    packed = {
        root: (skeleton, [on_host(record) for record in stored.records if record.path[: len(root)] == root])
        for root, skeleton in stored.skeletons.items()
        if root in template_skeletons
    }
    return tree.fill(value, place, packed)


def no_intact_step(report: RestoreReport, directory: pathlib.Path) -> NoIntactStepError:
    """The error for a directory that holds steps and none that can be restored."""
    lines = "".join(f"\n    {line}" for each in report.candidates for line in str(each).splitlines())
    foreign = any(candidate.verdict == "unverified" for candidate in report.candidates)
    error = NoIntactStepError(
        what=f"none of the {len(report.candidates)} step(s) in {directory} can be restored:{lines}",
        why="starting afresh here would bury the run; nothing was deleted.",
        fix="ct.adopt(directory) takes over the steps of plain Orbax."
        if foreign
        else "see what ct.repair(directory, dry_run=True) can do, or choose another directory for a new run.",
    )
    error.report = report
    return error
