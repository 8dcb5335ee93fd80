# SPDX-License-Identifier: Apache-2.0
"""How the processes of one run come together: at its opening, and over the steps that a restore looks at."""

import pathlib
import secrets

from ..errors import CheckpointError, SpecError, StorageError
from ..spec.spec import CheckpointSpec
from ..store import commit, layout
from ..store.run_directory import RunDirectory
from .group import Group


def open_run(group: Group, run: RunDirectory, spec: CheckpointSpec, *, has_validation: bool) -> None:
    """Make sure that a run can be written, and that all processes mean the same run and see the same folder.

    Raises:
        StorageError: If it cannot, before anything was trained.
        SpecError: If the processes have different specs, or one that only a single process can honour.
    """

    def prepare() -> dict[str, str]:
        if not run.is_used():
            # A run that has steps may be restored from a disk that cannot be written; a new run needs one that can.
            commit.require_writable(run.directory)
        return {
            "spec": spec.fingerprint(),
            "directory": str(run.directory),
            "probe": _write_probe(group, run.directory),
        }

    if group.count == 1:
        prepare()
        return
    _require_supported(group, spec, has_validation=has_validation)
    told = group.broadcast("the opening", prepare)
    error: CheckpointError | None = None
    if told["spec"] != spec.fingerprint():
        error = SpecError(
            what=f"process {group.index} has another spec than process 0.",
            why="when to save and what to keep is decided once for all.",
            fix="pass the same CheckpointSpec in every process.",
        )
    elif told["probe"] and not layout.get_control_path(run.directory, told["probe"]).exists():
        error = StorageError(
            what=f"process {group.index} does not see in {run.directory} what process 0 has written to "
            f"{told['directory']}.",
            why="all processes write their parts of a step into one folder.",
            fix="put the run on a file system that every machine has mounted, under the same path.",
        )
    try:
        group.raise_if_any_failed("the opening", error)
    finally:
        if group.is_leader and told["probe"]:
            layout.get_control_path(run.directory, told["probe"]).unlink(missing_ok=True)


def _write_probe(group: Group, root: pathlib.Path) -> str:
    """Write a small file for the others to look for; "" on a disk that cannot be written, as a restore may have."""
    if group.count == 1:
        return ""
    name = f"probe-{secrets.token_hex(4)}"
    try:
        layout.get_control_path(root, name).write_bytes(b"")
    except OSError:
        return ""
    return name


def _require_supported(group: Group, spec: CheckpointSpec, *, has_validation: bool) -> None:
    if spec.mirror is not None:
        raise SpecError(
            what=f"this run has {group.count} processes and a mirror.",
            why="a copy is fetched and settled by one process alone in this version.",
            fix="leave mirror= out and copy the steps from outside: `ckpttools mirror`, from one process.",
        )
    if has_validation:
        raise SpecError(
            what=f"this run has {group.count} processes and a validation function.",
            why="a process whose part is damaged would not call it, and the others might wait for that process in it.",
            fix="leave validate= out; every part is proved by its digest all the same.",
        )
