# SPDX-License-Identifier: Apache-2.0
"""`adopt`: add manifests to steps that Orbax or flax wrote, so that they can be verified from now on.

The files of an Orbax step are not changed; a manifest is added, and a directory with another name, such as
`ckpt_000010`, is renamed to its number. A flax file is converted to a step beside it. The manifest records what is on
disk today: neither program stores digests, so nobody can know whether that is what was saved.
"""

import os
import pathlib
import secrets
import shutil
from collections.abc import Sequence

from ..errors import IncompleteStepError, StepOrderError, StorageError
from ..sources import foreign_snapshot
from ..sources.open_source import Source, open_source
from ..store import catalogue, commit, layout, orbax, path_kinds
from ..store.catalogue import Entry
from ..store.lock import WriterLock
from ..store.manifest import Lineage

_LEFT_MANIFEST = f"{layout.MANIFEST}{commit.TEMPORARY}"
"""What a kill can leave in a step that was being adopted."""


def adopt(
    directory: str | os.PathLike[str],
    *,
    into: str | os.PathLike[str] | None = None,
    step: int | None = None,
    dry_run: bool = False,
) -> tuple[int, ...]:
    """Turn the checkpoints that Orbax (v0 and v1) or flax wrote into steps of a run.

    Args:
        directory: A directory of checkpoints whose names end in their step, such as `10`, `ckpt_000010` or
            `checkpoint_10`; with `into`, possibly a single checkpoint.
        into: Another run, new or existing, to copy the steps to; `directory` is then only read. None adopts the steps
            in place.
        step: Number of the step, for a single checkpoint; None takes it from the name, or 0 if the name has none.
        dry_run: Only return which steps would be adopted.

    Returns:
        The steps, in increasing order.

    Raises:
        NotARunError: If `directory` is not a run, or is a single checkpoint and `into` is not given.
        StepOrderError: If a number is already used, two checkpoints have the same number, or with `into` all steps are
            already those of a run; nothing was changed.
        StorageError: If a step cannot be read; those before it are adopted.
        RunInUseError: If a process writes to the run.

    Example:
        >>> import tempfile
        >>> import ckpttools as ct
        >>> run = tempfile.mkdtemp()
        >>> with ct.open(ct.CheckpointSpec(directory=run, storage=ct.Storage(asynchronous=False))) as ckpt:
        ...     saved = [ckpt.save(step, {"count": step}) for step in (1, 2)]
        >>> ct.adopt(run, dry_run=True)  # all steps have manifests
        ()
    """
    with open_source(directory) as source:
        entries = _list_foreign_steps(source, pathlib.Path(os.path.abspath(directory)), into is not None, step)
        root = source.root if into is None else pathlib.Path(os.path.abspath(into))
        assert root is not None
        if into is not None:
            path_kinds.require_startable(root)
        _require_free_numbers(entries, root, is_copied=into is not None)
        if dry_run:
            for entry in entries:
                _describe(entry)
        elif entries:
            commit.require_writable(root)
            with WriterLock(root).hold():
                # Read again: another process may have committed since.
                current = catalogue.scan(root)
                lineage = current.lineage or ((secrets.token_hex(4), 0),)
                for sequence, entry in enumerate(entries, start=current.next_sequence):
                    _adopt_step(entry, root, sequence, lineage, is_copied=into is not None)
        return tuple(entry.step for entry in entries)


def _list_foreign_steps(source: Source, path: pathlib.Path, is_copied: bool, step: int | None) -> list[Entry]:
    """Return the checkpoints to adopt, by step."""
    if source.root is None or (source.is_single and not is_copied):
        raise path_kinds.make_not_a_run_error(
            path_kinds.identify(path), "a single checkpoint is not in a run, so it needs one."
        )
    entries = [entry for entry in source.steps.entries if entry.state == "unverified"]
    if step is not None:
        if not source.is_single:
            raise StepOrderError(
                what=f"step={step!r} was given for {source.name}, which is not a single checkpoint.",
                why="the names of a run's checkpoints contain their numbers.",
                fix="omit step=.",
            )
        if type(step) is not int or layout.parse_step_number(str(step)) is None:
            raise StepOrderError(
                what=f"step={step!r} is not a step number.",
                why="the number names the step's directory.",
                fix="step=1000",
            )
        entries = [catalogue.make_foreign_entry(entry.path, step) for entry in entries]
    if not entries and path_kinds.identify(path).kind == "foreign run":
        # Unfinished saves, or checkpoints without a number: the error names them.
        raise path_kinds.make_not_a_run_error(
            path_kinds.identify(path), "none of them is a finished checkpoint with a step number."
        )
    if not entries and is_copied and source.steps.entries:
        steps = ", ".join(str(entry.step) for entry in source.steps.entries)
        raise StepOrderError(
            what=f"{source.name} holds nothing to adopt: step {steps} has a manifest already.",
            why="only checkpoints of Orbax or flax are adopted; nothing was copied.",
            fix=f"cp -r {source.steps.entries[-1].path} RUN copies a step to another run.",
        )
    return sorted(entries, key=lambda entry: entry.step)


def _require_free_numbers(entries: Sequence[Entry], root: pathlib.Path, *, is_copied: bool) -> None:
    """Raise `StepOrderError` if the directory of a checkpoint's number is already used."""
    taken = {layout.get_step_directory(root, entry.step) for entry in catalogue.scan(root).entries if is_copied}
    for entry in entries:
        target = layout.get_step_directory(root, entry.step)
        if target in taken or (target != entry.path and target.exists()):
            raise StepOrderError(
                what=f"{entry.path} cannot become step {entry.step} of {root}: that number is already used.",
                why="one of the two steps would be lost; nothing was changed.",
                fix=f'move one of them away, or ct.adopt({str(entry.path)!r}, into="runs/new", step=...).',
            )
        taken.add(target)


def _describe(entry: Entry) -> None:
    """Raise unless the metadata of a checkpoint can be read; reads no arrays of an Orbax checkpoint."""
    try:
        if entry.path.is_file():
            foreign_snapshot.read_snapshot(entry)
        else:
            orbax.describe_foreign(entry.path)
    except (orbax.ReadError, IncompleteStepError) as error:
        raise _make_unreadable_error(entry, error) from error


def _adopt_step(entry: Entry, root: pathlib.Path, sequence: int, lineage: Lineage, *, is_copied: bool) -> None:
    if entry.path.is_symlink() and not is_copied:
        raise StorageError(
            what=f"step {entry.step} cannot be adopted: {entry.path} is a link.",
            why="its manifest would be written outside the run.",
            fix=f'ct.adopt({str(entry.path.resolve())!r}, into="runs/new", step={entry.step}) copies it.',
        )
    try:
        taken = foreign_snapshot.read_snapshot(entry)
    except IncompleteStepError as error:
        raise _make_unreadable_error(entry, error) from error
    target = layout.get_step_directory(root, entry.step)
    if entry.path.is_dir() and not is_copied:
        # First the name and then the manifest: a kill between the two leaves a step that can still be adopted.
        if entry.path != target:
            commit.move(entry.path, target)
            entry = catalogue.make_foreign_entry(target, entry.step)
        # Earlier versions wrote the manifest here before they renamed it, and may have been killed.
        target.joinpath(_LEFT_MANIFEST).unlink(missing_ok=True)
        data = foreign_snapshot.make_manifest(entry, taken, target, sequence=sequence, lineage=lineage)
        commit.sync_tree(target)
        temporary = layout.get_control_path(root, _LEFT_MANIFEST)  # Where the next writer removes it after a kill.
        commit.write_file(target / layout.MANIFEST, data, temporary=temporary)
        return
    staged = layout.get_control_path(root, f"staging/adopt-{secrets.token_hex(4)}") / str(entry.step)
    try:
        with commit.wrap_os_errors(f"step {entry.step} cannot be copied to {root}"):
            commit.make_directory(staged.parent)
            if entry.path.is_dir():
                shutil.copytree(entry.path, staged, ignore=shutil.ignore_patterns(_LEFT_MANIFEST))
            else:
                orbax.write(staged, taken, compression=False)
            data = foreign_snapshot.make_manifest(entry, taken, staged, sequence=sequence, lineage=lineage)
            (staged / layout.MANIFEST).write_bytes(data)
            commit.commit_step(root, staged, entry.step)
    finally:
        shutil.rmtree(staged.parent, ignore_errors=True)


def _make_unreadable_error(entry: Entry, error: orbax.ReadError | IncompleteStepError) -> StorageError:
    text = error.what if isinstance(error, IncompleteStepError) else f"{entry.path} cannot be read: {error}"
    return StorageError(
        what=f"step {entry.step} cannot be adopted: {text.rstrip('.')}.",
        why="another program wrote it, without digests: it may be damaged, or its format is unknown.",
        fix=f"move {entry.path} away, or save it again with named items (args=Composite(model=...)).",
    )
