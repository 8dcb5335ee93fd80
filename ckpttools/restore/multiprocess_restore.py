# SPDX-License-Identifier: Apache-2.0
"""A restore by several processes: they try the same steps, and a step is taken only if all could read it."""

from collections.abc import Callable

from ..errors import CheckpointError, IncompleteStepError, ProcessError, StepDamagedError
from ..processes.group import Group
from ..store import layout
from ..store.catalogue import Entry
from ..store.run_directory import RunDirectory
from . import select
from .recovery import Attempt, LoadedStep
from .report import Candidate
from .select import Selector


def list_candidates(group: Group, run: RunDirectory, selector: Selector) -> list[Entry]:
    """The steps that a restore tries, the same in every process: what the leader sees."""
    if group.is_leader:
        found: list[Entry] = []

        def list_names() -> list[str]:
            found.extend(select.list_candidates(run.refresh_steps(), selector))
            return [entry.path.relative_to(run.directory).as_posix() for entry in found]

        group.broadcast("the steps to restore", list_names)
        return found
    told = group.broadcast("the steps to restore", list)
    known = run.refresh_steps()
    seen = {entry.path.relative_to(run.directory).as_posix(): entry for entry in (*known.entries, *known.moved_entries)}
    return [seen[name] if name in seen else _make_unseen_entry(run, name) for name in told]


def _make_unseen_entry(run: RunDirectory, name: str) -> Entry:
    path = run.directory / name
    error = IncompleteStepError(what=f"step {path.name} is not to be seen from this process.")
    return Entry(
        step=layout.parse_step_number(path.name.partition("-")[0]) or 0, path=path, state="incomplete", error=error
    )


def make_coordinator(group: Group) -> Callable[[Entry, Attempt], tuple[LoadedStep, list[Candidate]]]:
    """For recovery: a step is taken if all processes could read it, and is damaged for all if it is for one."""

    def coordinate(entry: Entry, attempt: Attempt) -> tuple[LoadedStep, list[Candidate]]:
        outcome: tuple[LoadedStep, list[Candidate]] | Exception
        verdict: list[str] | None = None
        try:
            outcome = attempt()
        except Exception as failure:
            outcome = failure
            verdict = ["damaged" if isinstance(failure, StepDamagedError) else "other", str(failure)]
        verdicts = group.all_gather(f"the restore of step {entry.step}", verdict)
        # Damage is passed over; any other error has to end the restore in every process.
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
    text = verdict[1].splitlines()[0]
    if verdict[0] == "damaged":
        return IncompleteStepError(what=f"step {step} could not be read by process {index}: {text}")
    return ProcessError(
        what=f"process {index} could not restore step {step}: {text}",
        why="one process without its part of the state would train something else than the others.",
        fix="look at the output of that process.",
    )
