# SPDX-License-Identifier: Apache-2.0
"""Restore by several processes: all try the same steps, and use one only if every process could read it."""

from collections.abc import Callable

from ..errors import CheckpointError, IncompleteStepError, ProcessError, StepDamagedError
from ..processes.messages import Group
from ..store import layout
from ..store.catalogue import Entry
from ..store.run_directory import RunDirectory
from . import select
from .first_intact import Attempt
from .read_step import LoadedStep
from .report import Candidate
from .select import Selector


def list_candidates(group: Group, run: RunDirectory, selector: Selector) -> list[Entry]:
    """Return the steps to try, the same in every process: those that the leader sees."""
    if group.is_leader:
        found: list[Entry] = []

        def list_names() -> list[str]:
            found.extend(select.list_candidates(run.refresh_steps(), selector))
            return [entry.path.relative_to(run.directory).as_posix() for entry in found]

        group.broadcast("the steps to restore", list_names)
        return found
    names = group.broadcast("the steps to restore", list)
    steps = run.refresh_steps()
    seen = {entry.path.relative_to(run.directory).as_posix(): entry for entry in (*steps.entries, *steps.moved_entries)}
    return [seen[name] if name in seen else _make_unseen_entry(run, name) for name in names]


def _make_unseen_entry(run: RunDirectory, name: str) -> Entry:
    path = run.directory / name
    error = IncompleteStepError(what=f"this process does not see step {path.name}.")
    return Entry(
        step=layout.parse_step_number(path.name.partition("-")[0]) or 0, path=path, state="incomplete", error=error
    )


def make_coordinator(group: Group) -> Callable[[Entry, Attempt], tuple[LoadedStep, list[Candidate]]]:
    """Return a coordinator: a step is used if all processes could read it, and is damaged for all if it is for one."""

    def coordinate(entry: Entry, attempt: Attempt) -> tuple[LoadedStep, list[Candidate]]:
        outcome: tuple[LoadedStep, list[Candidate]] | Exception
        verdict: list[str] | None = None
        try:
            outcome = attempt()
        except Exception as failure:
            outcome = failure
            verdict = ["damaged" if isinstance(failure, StepDamagedError) else "other", str(failure)]
        verdicts = group.all_gather(f"the restore of step {entry.step}", verdict)
        # Damage skips the step; any other error must end the restore in every process.
        for kind in ("other", "damaged"):
            failed = [(index, each) for index, each in enumerate(verdicts) if each is not None and each[0] == kind]
            if failed and isinstance(outcome, Exception) and verdict is not None and verdict[0] == kind:
                raise outcome
            if failed:
                raise _make_remote_error(entry.step, *failed[0])
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    return coordinate


def _make_remote_error(step: int, index: int, verdict: list[str]) -> CheckpointError:
    reason = verdict[1].splitlines()[0]
    if verdict[0] == "damaged":
        return IncompleteStepError(what=f"step {step} could not be read by process {index}: {reason}")
    return ProcessError(
        what=f"process {index} could not restore step {step}: {reason}",
        why="without its part of the state, one process would train another model than the others.",
        fix="see the output of that process.",
    )
