# SPDX-License-Identifier: Apache-2.0
"""A restore by several processes: they try the same steps, and a step is taken only if all could read it."""

from collections.abc import Callable

from ..errors import CheckpointError, IncompleteStepError, ProcessError, StepDamagedError
from ..processes.group import Group
from ..store import layout
from ..store.catalogue import Entry
from ..store.run_directory import RunFolder
from . import select
from .recovery import Attempt, Loaded
from .report import Candidate
from .select import Selector


def candidates(group: Group, run: RunFolder, selector: Selector) -> list[Entry]:
    """The steps that a restore tries, the same in every process: what the leader sees."""
    if group.leads:
        found: list[Entry] = []

        def names() -> list[str]:
            found.extend(select.order(run.steps_now(), selector))
            return [entry.path.relative_to(run.directory).as_posix() for entry in found]

        group.decide("the steps to restore", names)
        return found
    told = group.decide("the steps to restore", list)
    known = run.steps_now()
    seen = {entry.path.relative_to(run.directory).as_posix(): entry for entry in (*known.entries, *known.set_aside)}
    return [seen[name] if name in seen else _unseen(run, name) for name in told]


def _unseen(run: RunFolder, name: str) -> Entry:
    path = run.directory / name
    error = IncompleteStepError(what=f"step {path.name} is not to be seen from this process.")
    return Entry(step=layout.step_number(path.name.partition("-")[0]) or 0, path=path, state="incomplete", error=error)


def restoring(group: Group) -> Callable[[Entry, Attempt], tuple[Loaded, list[Candidate]]]:
    """For recovery: a step is taken if all processes could read it, and is damaged for all if it is for one."""

    def together(entry: Entry, attempt: Attempt) -> tuple[Loaded, list[Candidate]]:
        outcome: tuple[Loaded, list[Candidate]] | Exception
        verdict: list[str] | None = None
        try:
            outcome = attempt()
        except Exception as failure:
            outcome = failure
            verdict = ["damaged" if isinstance(failure, StepDamagedError) else "other", str(failure)]
        verdicts = group.exchange(f"the restore of step {entry.step}", verdict)
        # Damage is passed over; any other error has to end the restore in every process.
        for kind in ("other", "damaged"):
            failed = [(index, each) for index, each in enumerate(verdicts) if each is not None and each[0] == kind]
            if failed and isinstance(outcome, Exception) and verdict is not None and verdict[0] == kind:
                raise outcome
            if failed:
                raise _failed_elsewhere(entry.step, *failed[0])
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    return together


def _failed_elsewhere(step: int, index: int, verdict: list[str]) -> CheckpointError:
    text = verdict[1].splitlines()[0]
    if verdict[0] == "damaged":
        return IncompleteStepError(what=f"step {step} could not be read by process {index}: {text}")
    return ProcessError(
        what=f"process {index} could not restore step {step}: {text}",
        why="one process without its part of the state would train something else than the others.",
        fix="look at the output of that process.",
    )
