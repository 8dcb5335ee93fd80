# SPDX-License-Identifier: Apache-2.0
"""The checks when a run is opened: its directory can be written, and all processes mean the same run."""

import pathlib
import secrets

from ..errors import CheckpointError, SpecError, StorageError
from ..spec.spec import CheckpointSpec
from ..store import commit, layout, path_kinds
from ..store.run_directory import RunDirectory
from .messages import Group


def open_run(group: Group, run: RunDirectory, spec: CheckpointSpec, *, has_validation: bool) -> None:
    """Check that a run can be written, and that all processes have the same spec and see the same directory.

    Args:
        group: The processes.
        run: The run directory.
        spec: The spec of this process.
        has_validation: Whether the run has a validation function.

    Raises:
        NotARunError: If the directory is a step, is inside one, or contains another program's checkpoints.
        StorageError: If the directory cannot be written, or is not the same one in all processes.
        SpecError: If the processes have different specs, or one that only works with a single process.
    """

    def prepare() -> dict[str, str]:
        path_kinds.require_startable(run.directory)
        if not run.is_used():
            # A run that has steps may be restored from a read-only disk; a new run has to be written.
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
    leader = group.broadcast("the opening", prepare)
    error: CheckpointError | None = None
    if leader["spec"] != spec.fingerprint():
        error = SpecError(
            what=f"process {group.index} has another spec than process 0.",
            why="the leader decides for all processes when to save and what to keep.",
            fix="pass the same CheckpointSpec in every process.",
        )
    elif leader["probe"] and not layout.get_control_path(run.directory, leader["probe"]).exists():
        error = StorageError(
            what=f"process {group.index} does not see in {run.directory} what process 0 has written to "
            f"{leader['directory']}.",
            why="all processes write their parts of a step into one directory.",
            fix="put the run on a file system that every machine has mounted, under the same path.",
        )
    try:
        group.raise_if_any_failed("the opening", error)
    finally:
        if group.is_leader and leader["probe"]:
            layout.get_control_path(run.directory, leader["probe"]).unlink(missing_ok=True)


def _write_probe(group: Group, root: pathlib.Path) -> str:
    """Write a small file for the others to look for, and return its name; "" on a read-only disk."""
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
            why="in this version only a run of one process can copy steps and restore copies.",
            fix="leave mirror= out, and run `ckpttools mirror` in one separate process.",
        )
    if has_validation:
        raise SpecError(
            what=f"this run has {group.count} processes and a validation function.",
            why="a process whose part is damaged would not call it, and the others might wait for that process in it.",
            fix="omit validate=; digests still verify every part.",
        )
