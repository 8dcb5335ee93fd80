# SPDX-License-Identifier: Apache-2.0
"""`verify`: read every byte of a run and compare it with what was written; changes nothing.

File digests need no JAX; the reader of the leaves, which does, is imported once they have been compared.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from .. import store
from ..errors import StepDamagedError, StorageError
from ..sources.open_source import Location, Source, make_not_found_error, open_source
from ..store import catalogue, file_integrity
from ..store.catalogue import MAX_LISTINGS, were_deleted
from ..text import format_health


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepHealth:
    """What `verify` found about one step.

    Attributes:
        step: Its number.
        state: "intact", "incomplete", "corrupt", "unreadable" if the disk or Orbax failed on undamaged files,
            "newer" if a newer version wrote it, or "unverified" for a step of plain Orbax.
        reason: What is wrong; "" if it is intact.
        files: Damaged files, relative to the step's directory.
        leaves: Damaged leaves, as far as the files could be read.
        branch: Name of its branch; "" if unknown.
        superseded: Whether the step was superseded.

    Example:
        >>> import ckpttools as ct
        >>> print(ct.StepHealth(step=500, state="corrupt", reason="1 leaf differs", leaves=("model.kernel",)))
        step 500: corrupt, 1 leaf differs
            damaged leaf: model.kernel
    """

    step: int
    state: str
    reason: str = ""
    files: tuple[str, ...] = ()
    leaves: tuple[str, ...] = ()
    branch: str = ""
    superseded: bool = False

    def __str__(self) -> str:
        # A live step of another branch may have the same number.
        origin = f" (superseded, branch {self.branch})" if self.superseded else ""
        return format_health(self.step, self.state, self.reason, leaves=self.leaves, files=self.files, origin=origin)


@dataclasses.dataclass(frozen=True)
class VerifyReport:
    """The health of every step that was read.

    Attributes:
        steps: One entry for each step.
        found: What the location is, as a sentence, if it has no steps; "" otherwise.

    Example:
        >>> import ckpttools as ct
        >>> healthy, damaged = ct.StepHealth(step=500, state="intact"), ct.StepHealth(step=1000, state="incomplete")
        >>> ct.VerifyReport((healthy,)).ok, ct.VerifyReport((healthy, damaged)).ok
        (True, False)
    """

    steps: tuple[StepHealth, ...]
    found: str = ""

    @property
    def ok(self) -> bool:
        """Whether at least one step is intact and none is damaged; steps of other programs cannot be verified."""
        states = {step.state for step in self.steps}
        return "intact" in states and states <= {"intact", "unverified"}

    def as_dict(self) -> dict[str, Any]:
        """Return the report as plain data."""
        return {"ok": self.ok, "steps": [dataclasses.asdict(step) for step in self.steps], "found": self.found}

    def __str__(self) -> str:
        return "\n".join(map(str, self.steps)) or f"no steps: {self.found}"


def verify(
    directory: Location,
    step: int | None = None,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> VerifyReport:
    """Compare every file and leaf of a run, or of one step, with what was written.

    Steps that the run deletes in the meantime are omitted.

    Args:
        directory: The directory of a run or of one step, or a mirror or its address.
        step: Only this step; None for all.
        progress: Called with the bytes read so far and the bytes in total.

    Raises:
        StepNotFoundError: If `step` does not exist.
        NotARunError: If the directory does not exist, or is a file or part of a step.
        MirrorError: If a mirror does not answer.

    Example:
        >>> import tempfile
        >>> import ckpttools as ct
        >>> run = tempfile.mkdtemp()
        >>> with ct.open(ct.CheckpointSpec(directory=run, storage=ct.Storage(asynchronous=False))) as ckpt:
        ...     saved = [ckpt.save(step, {"count": step}) for step in (1, 2)]
        >>> ct.verify(run).ok
        True
    """
    for _ in range(MAX_LISTINGS):
        with open_source(directory) as source:
            report = _verify_source(source, step, progress)
            if report.steps or not were_deleted(source.all_entries):
                break
    return report


def _verify_source(source: Source, step: int | None, progress: Callable[[int, int], None] | None) -> VerifyReport:
    entries = [entry for entry in source.all_entries if step is None or entry.step == step]
    if step is not None and not entries:
        raise make_not_found_error(source.name, step, source.steps)
    total = sum(_get_total_bytes(entry) for entry in entries)
    done = 0

    def add_bytes(size: int) -> None:
        nonlocal done
        done += size
        if progress is not None:
            progress(done, total)

    examined = [(entry, _add_branch(entry, _examine(entry, source, add_bytes))) for entry in entries]
    kept = [health for entry, health in examined if entry.fetch is not None or entry.path.exists()]
    kept += [_make_unfinished_health(name) for name in source.unfinished if step is None]
    return VerifyReport(tuple(kept), found="" if kept else source.text)


def _make_unfinished_health(name: str) -> StepHealth:
    """Return the health of a copy without an intact manifest."""
    reason = f"the copy {name} has no intact manifest: it is being written, is unfinished, or is damaged"
    return StepHealth(step=int(name.partition("-")[0]), state="incomplete", reason=reason)


def _add_branch(entry: catalogue.Entry, health: StepHealth) -> StepHealth:
    branch = entry.lineage[-1][0] if entry.lineage else ""
    return dataclasses.replace(health, branch=branch, superseded=entry.info is not None and entry.info.superseded)


def _get_total_bytes(entry: catalogue.Entry) -> int:
    return entry.manifest.summary.total_bytes if entry.manifest else 0


def _examine(entry: catalogue.Entry, source: Source, on_bytes: Callable[[int], None]) -> StepHealth:
    if entry.manifest is None:
        error = entry.error
        named = error.files if isinstance(error, StepDamagedError) else ()
        return StepHealth(step=entry.step, state=entry.state, reason=error.what if error else "", files=named)
    files: tuple[str, ...] = ()
    if source.find_damaged_files is not None:
        files = source.find_damaged_files(entry)
        on_bytes(entry.manifest.summary.total_bytes)
        reason = f"{len(files)} file(s) of the copy are missing or differ from what was written" if files else ""
        return StepHealth(step=entry.step, state="corrupt" if files else "intact", reason=reason, files=files)
    try:
        files = file_integrity.find_damaged_files(entry, on_bytes)
        items = entry.manifest.contents.items
        store.leaf_integrity.read_verified(entry, {item: stored.records for item, stored in items.items()})
    except StepDamagedError as error:
        return StepHealth(step=entry.step, state="corrupt", reason=error.what, files=files, leaves=error.leaves)
    except StorageError as error:
        # The other steps are still checked.
        return StepHealth(step=entry.step, state="unreadable", reason=error.what)
    if files:
        reason = f"{len(files)} file(s) differ from what was written; all leaves are still readable"
        return StepHealth(step=entry.step, state="corrupt", reason=reason, files=files)
    return StepHealth(step=entry.step, state="intact")
