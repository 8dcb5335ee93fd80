# SPDX-License-Identifier: Apache-2.0
"""Read the steps at a path or address: a run, one step, a mirror, or another program's checkpoints.

Commands that only list steps use this file too, so it imports neither JAX nor Orbax. A copy at a mirror is fetched to a
temporary directory when its arrays are needed, and removed when the source is closed.
"""

import contextlib
import dataclasses
import os
import pathlib
import re
import tempfile
from collections.abc import Callable, Iterator

from ..errors import StepNotFoundError, StorageError
from ..mirror.merge_copies import merge_copies
from ..mirror.remote_store import Copy, RemoteStore
from ..restore.select import list_available_steps, select_one_branch
from ..spec.mirror import Mirror
from ..store import catalogue, layout, path_kinds
from ..store.catalogue import Catalogue, Entry
from ..store.path_kinds import Contents

type Location = str | os.PathLike[str] | Mirror
"""The directory of a run or of one step, another program's checkpoint, or a mirror or its address."""

_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://.+")
_WHY_NOT = "a run is a directory with a numbered directory for each step; nothing was read or changed."


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """The steps at a location.

    Attributes:
        name: The location, for messages.
        text: A sentence that says what the location is.
        fix: What to type if another location was meant.
        steps: The steps; those of a mirror have `fetch`.
        root: The run's directory, or the directory of the single step; None for a mirror.
        is_single: Whether the location is one step.
        unfinished: Names of copies at a mirror without an intact manifest.
        find_damaged_files: A function that returns the damaged files of a copy at a mirror; None for local steps.
    """

    name: str
    text: str
    fix: str
    steps: Catalogue
    root: pathlib.Path | None = None
    is_single: bool = False
    unfinished: tuple[str, ...] = ()
    find_damaged_files: Callable[[Entry], tuple[str, ...]] | None = None

    @property
    def all_entries(self) -> tuple[Entry, ...]:
        """Every step, including those that were moved aside."""
        return (*self.steps.entries, *self.steps.moved_entries)


@contextlib.contextmanager
def open_source(location: Location) -> Iterator[Source]:
    """Read the steps at a location; remove copies that were fetched from a mirror at the end.

    Args:
        location: A directory, a flax file, or a mirror or its address.

    Raises:
        NotARunError: If it does not exist, or is a file, an item of a step or another part of a run.
        StepNotFoundError: If it is the path of a step that its run does not have.
        MirrorError: If a mirror does not answer.
    """
    if isinstance(location, Mirror):
        reading: contextlib.AbstractContextManager[Source] = _open_mirror(location)
    elif isinstance(location, str) and _ADDRESS.fullmatch(location):
        reading = _open_mirror(Mirror(location))
    else:
        found = path_kinds.identify(location)
        if found.kind == "mirror":
            reading = _open_mirror(Mirror(found.path.as_uri()))
        else:
            reading = contextlib.nullcontext(_read_directory(found))
    with reading as source:
        yield source


def _read_directory(found: Contents) -> Source:
    if found.kind == "missing":
        _raise_if_step_is_missing(found.path)
    if found.kind in ("missing", "file", "inside"):
        raise path_kinds.make_not_a_run_error(found, _WHY_NOT)
    single: Entry | None = None
    if found.kind == "step":
        single = _find_in_run(found) or catalogue.examine_step(found.path, found.step or 0)
    elif found.kind == "foreign step":
        single = catalogue.make_foreign_entry(found.path, found.step or 0)
    if found.kind == "parent":
        steps = Catalogue(())  # A run whose name is a number is not a step.
    else:
        steps = catalogue.scan(found.path) if single is None else Catalogue((single,))
    return Source(
        name=str(found.path),
        text=found.text,
        fix=path_kinds.suggest_fix(found),
        steps=steps,
        root=found.path,
        is_single=single is not None,
    )


def _find_in_run(found: Contents) -> Entry | None:
    """Return a step's entry from the catalogue of its run, which marks superseded steps; None outside a run."""
    if layout.parse_step_number(found.path.name) is None:
        return None
    entries = catalogue.scan(found.path.parent).entries
    return next((entry for entry in entries if entry.path == found.path), None)


def _raise_if_step_is_missing(path: pathlib.Path) -> None:
    step = layout.parse_step_number(path.name)
    if step is not None and path.parent.is_dir() and (steps := catalogue.scan(path.parent)).entries:
        raise make_not_found_error(str(path.parent), step, steps)


def make_not_found_error(name: str, step: int, steps: Catalogue) -> StepNotFoundError:
    """Return the error for a step that does not exist at a location."""
    return StepNotFoundError(
        what=f"{name} has no step {step}.",
        why="it was never saved, or retention has deleted it.",
        fix=f"available: {list_available_steps(steps)}.",
    )


def find_step(source: Source, step: int | None = None) -> Entry:
    """Return a readable step of a source: the newest committed one, or the one with the given number.

    Raises:
        StepNotFoundError: If it does not exist.
        StepDamagedError: If it is damaged.
    """
    if step is not None or source.is_single:
        numbered = [entry for entry in source.all_entries if step in (None, entry.step)]
        found = next(iter(select_one_branch(numbered)), None)
    else:
        foreign = [entry for entry in source.steps.entries if entry.state == "unverified"]
        found = max(source.steps.live_entries or foreign, key=lambda entry: entry.step, default=None)
    if found is None and step is not None:
        raise make_not_found_error(source.name, step, source.steps)
    if found is None:
        raise make_empty_error(source)
    if found.state not in ("committed", "unverified") and found.error is not None:
        raise found.error
    return found


def make_empty_error(source: Source) -> StepNotFoundError:
    """Return the error for a location without a readable step."""
    if source.steps.entries:
        listed = ", ".join(f"{entry.step} ({entry.state})" for entry in source.steps.entries)
        why, fix = f"all of its steps are damaged: {listed}.", "ct.repair(directory, dry_run=True) shows the repairs."
    else:
        why, fix = source.text, source.fix
    return StepNotFoundError(what=f"{source.name} has no readable step.", why=why, fix=fix)


@contextlib.contextmanager
def _open_mirror(mirror: Mirror) -> Iterator[Source]:
    store = RemoteStore(mirror.url, mirror.store_options)
    copies = store.list_copies()
    unfinished = set(store.list_names()) - {copy.name for copy in copies}
    with tempfile.TemporaryDirectory(prefix="ckpttools-", ignore_cleanup_errors=True) as holder:
        pairs = [(copy, _make_entry(store, copy, pathlib.Path(holder))) for copy in copies]
        by_path = {entry.path: copy for copy, entry in pairs}
        yield Source(
            name=mirror.url,
            text=f"{mirror.url} is a mirror." if copies else f"{mirror.url} contains no copies of steps.",
            fix="check the address: it is `mirror` in the spec of the run.",
            steps=merge_copies(Catalogue(()), pairs),
            unfinished=tuple(sorted(unfinished)),
            find_damaged_files=lambda entry: store.find_damaged_files(by_path[entry.path]),
        )


def _make_entry(store: RemoteStore, copy: Copy, holder: pathlib.Path) -> Entry:
    """Return the entry of a copy, which `fetch` writes to a temporary directory."""
    step = copy.manifest.summary.step
    directory = holder / copy.name / str(step)

    def fetch() -> None:
        if directory.is_dir():
            return
        try:
            store.fetch(copy, directory)
        except OSError as error:
            if isinstance(error, StorageError):
                raise
            raise StorageError(
                what=f"step {step} could not be fetched from {store.url}: {error}.",
                why=f"a copy is written to {holder.parent} before its arrays are read.",
                fix="free space there, or set TMPDIR to a directory on a larger disk.",
            ) from error

    return Entry(step=step, path=directory, state="committed", manifest=copy.manifest, fetch=fetch)
