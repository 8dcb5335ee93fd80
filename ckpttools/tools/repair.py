# SPDX-License-Identifier: Apache-2.0
"""`repair`: rebuild damaged metadata from its second copies, and report what was done.

The list of steps needs no repair, since it is derived from the steps. What a step needs beside its arrays is small and
stored twice (`store.commit.copy_small_files`): a damaged manifest or metadata file is replaced by its second copy,
verified by its digest. A step whose array data is damaged is reported and left for quarantine. Steps in quarantine that
have become whole are moved back.
"""

import contextlib
import dataclasses
import os
import pathlib
import shutil
import stat

from ..errors import StepDamagedError
from ..store import catalogue, commit, digest, file_integrity, layout, manifest
from ..store.lock import WriterLock, hold_pins_lock
from ..store.run_directory import require_run_directory


@dataclasses.dataclass(frozen=True)
class Repair:
    """One problem, and what was, or would be, done about it.

    Attributes:
        where: The file or step.
        found: What is wrong with it.
        done: What was done, or in a dry run would be; "" if it cannot be repaired.

    Example:
        >>> import ckpttools as ct
        >>> print(ct.Repair("500/ckpttools.manifest", "is missing", "copied from the second copy"))
        500/ckpttools.manifest: is missing; copied from the second copy
    """

    where: str
    found: str
    done: str = ""

    def __str__(self) -> str:
        return f"{self.where}: {self.found}; {self.done or 'cannot be rebuilt'}"


@dataclasses.dataclass(frozen=True)
class RepairReport:
    """All that `repair` found.

    Attributes:
        repairs: One entry for each problem.
        dry_run: Whether nothing was touched.

    Example:
        >>> import ckpttools as ct
        >>> print(ct.RepairReport(repairs=(ct.Repair("500", "its arrays are damaged"),), dry_run=True))
        dry run, nothing was touched
        500: its arrays are damaged; cannot be rebuilt
    """

    repairs: tuple[Repair, ...]
    dry_run: bool

    def __str__(self) -> str:
        head = "dry run, nothing was touched" if self.dry_run else "repaired"
        return "\n".join([head, *map(str, self.repairs)]) if self.repairs else "nothing to repair"


def repair(directory: str | os.PathLike[str], *, dry_run: bool = False) -> RepairReport:
    """Rebuild damaged manifests and metadata, the list of pins, and whole steps from quarantine.

    Args:
        directory: The run's directory.
        dry_run: Change nothing, only report what would be done.

    Raises:
        RunInUseError: If a process writes to the run.

    Example:
        >>> import tempfile
        >>> import ckpttools as ct
        >>> run = tempfile.mkdtemp()
        >>> with ct.open(ct.CheckpointSpec(directory=run, storage=ct.Storage(asynchronous=False))) as ckpt:
        ...     saved = [ckpt.save(step, {"count": step}) for step in (1, 2)]
        >>> print(ct.repair(run, dry_run=True))
        nothing to repair
    """
    root = require_run_directory(directory)
    with contextlib.nullcontext() if dry_run else WriterLock(root).hold():
        found = [*_repair_pins(root, dry_run)]
        for entry in catalogue.scan(root).entries:
            # A step of plain Orbax has neither manifest nor second copy, which is not damage.
            found += [] if entry.state == "unverified" else _repair_step(root, entry.path, entry.step, dry_run)
        quarantined = layout.get_control_path(root, "quarantine")
        for path in sorted(quarantined.iterdir()) if quarantined.is_dir() else ():
            step = layout.parse_step_number(path.name.partition("-")[0])
            if step is not None:
                found += _repair_step(root, path, step, dry_run)
        return RepairReport(tuple(found), dry_run)


def _repair_pins(root: pathlib.Path, dry_run: bool) -> list[Repair]:
    if catalogue.has_intact_pins(root):
        return []
    if dry_run:
        pins = catalogue.read_pins(root)
    else:
        with hold_pins_lock(root):
            pins = catalogue.read_pins(root)
            catalogue.write_pins(root, pins)
    done = f"restored from its second copy: {sorted(pins)}" if pins else "replaced by an empty list"
    return [Repair("pins.json", "the list of pinned steps is damaged", done)]


def _repair_step(root: pathlib.Path, directory: pathlib.Path, step: int, dry_run: bool) -> list[Repair]:
    """Restore the damaged files of one step, and the step itself if it is in quarantine."""
    spare = _find_spare(root, directory, step)
    in_quarantine = directory.parent.name == "quarantine"
    damaged = _find_damaged(directory, spare)
    if not damaged and not in_quarantine:
        return []
    where = directory.relative_to(root).as_posix()
    lost = [name for name in damaged if not _is_replaceable(spare, name)]
    if spare is None or lost:
        what = ", ".join(lost or damaged) or "everything"
        return [Repair(where, f"damaged: {what}")]
    link = _find_link(directory, damaged)
    if link is not None:
        return [Repair(where, f"{link} is a link, which could lead out of the run")]
    repairs = [Repair(f"{where}/{name}", "damaged or missing", "restored from its second copy") for name in damaged]
    if not dry_run:
        for name in damaged:
            target = directory / name
            commit.make_directory(target.parent)
            if os.path.lexists(target) and not _is_regular(target):
                # Whatever is there does not belong to this step; it is neither written through nor deleted.
                aside = layout.find_free_path(
                    layout.get_control_path(root, "quarantine"), f"stray-{step}-{target.name}"
                )
                commit.move(target, aside)
            shutil.copyfile(spare / name, target)
        commit.sync_tree(directory)
    if in_quarantine:
        if layout.get_step_directory(root, step).exists():
            return [*repairs, Repair(where, f"whole, but there is another step {step}", "left in quarantine")]
        repairs.append(Repair(where, "whole again", f"moved back to {step}"))
        if not dry_run:
            commit.move(directory, layout.get_step_directory(root, step))
    return repairs


def _find_spare(root: pathlib.Path, directory: pathlib.Path, step: int) -> pathlib.Path | None:
    """Return the second copies that belong to a directory: by its manifest, or, if that is damaged, by its files."""
    candidates = []
    spares = layout.get_control_path(root, "spare")
    for spare in spares.iterdir() if spares.is_dir() else ():
        try:
            summary = manifest.read_sealed(spare).summary
        except (StepDamagedError, OSError):
            continue
        if summary.step == step:
            intact = sum(_is_intact(directory / name, size, mark) for name, (size, mark) in summary.files.items())
            candidates.append((intact, summary.sequence, spare))
    return max(candidates)[2] if candidates else None


def _find_link(directory: pathlib.Path, names: list[str]) -> str | None:
    """Return the first link among a step's directory and the directories of the files to restore."""
    for name in names:
        for place in (directory, *(directory / parent for parent in reversed(pathlib.PurePath(name).parents))):
            if place.is_symlink():
                return place.name
    return None


def _is_regular(path: pathlib.Path) -> bool:
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except OSError:
        return False


def _is_intact(path: pathlib.Path, size: int, expected_digest: str) -> bool:
    try:
        return (
            _is_regular(path)
            and path.stat().st_size == size
            and digest.hash_file(digest.get_algorithm(expected_digest), path) == expected_digest
        )
    except OSError:
        return False


def _find_damaged(directory: pathlib.Path, spare: pathlib.Path | None) -> list[str]:
    """Return the damaged files of a step, the manifest first; judged by the second copy of the manifest if any."""
    if spare is None:
        try:
            entry = catalogue.Entry(step=0, path=directory, state="committed", manifest=manifest.read(directory))
        except StepDamagedError:
            return [layout.MANIFEST]
        return list(file_integrity.find_damaged_files(entry))
    files = manifest.read_sealed(spare).summary.files
    seal = (spare / layout.MANIFEST).read_bytes()
    own = directory / layout.MANIFEST
    damaged = [] if _is_regular(own) and own.read_bytes() == seal else [layout.MANIFEST]
    return damaged + [name for name, (size, mark) in files.items() if not _is_intact(directory / name, size, mark)]


def _is_replaceable(spare: pathlib.Path | None, name: str) -> bool:
    if spare is None:
        return False
    if name == layout.MANIFEST:
        return True
    size, mark = manifest.read_sealed(spare).summary.files[name]
    return _is_intact(spare / name, size, mark)
