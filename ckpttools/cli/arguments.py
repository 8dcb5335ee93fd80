# SPDX-License-Identifier: Apache-2.0
"""What several commands make of their arguments: paths of runs and steps, and pairs NAME=VALUE.

One function, `parse_addresses`, says which steps `RUN/20`, `RUN 20` and the like name, for every command.
"""

import dataclasses
import os
import pathlib
from collections.abc import Iterable

from ..errors import CheckpointError, SpecError
from ..store import layout, path_kinds
from ..store.run_directory import require_run_directory
from .parser import parse_location


@dataclasses.dataclass(frozen=True)
class StepAddress:
    """A step that the arguments name.

    Attributes:
        location: A run, the directory of a step, or the address of a mirror.
        step: Number of the step in the run; None for the newest, or if the location is a step.
    """

    location: str | pathlib.Path
    step: int | None = None


def parse_addresses(location: str | pathlib.Path, words: Iterable[str] = ()) -> list[StepAddress]:
    """Return the steps that the arguments of a command name: `RUN`, `RUN/20`, `RUN 20 30`, `RUN/20 30`, `RUN/20 B/30`.

    A number is a step of the run before it, unless another directory has that name.

    Args:
        location: The first argument.
        words: The arguments after it.
    """
    found = [StepAddress(location)]
    for word in words:
        before = found[-1]
        run = _split_step_directory(before.location)[0]
        if not word.isdecimal() or _is_elsewhere(word, run):
            found.append(StepAddress(parse_location(word)))
            continue
        if before == StepAddress(run):
            found.pop()  # Named only as the run of the steps after it.
        found.append(StepAddress(run, int(word)))
    return found


def parse_one_address(location: str | pathlib.Path, words: Iterable[str]) -> StepAddress:
    """Return the step that the arguments of a command name, which takes one.

    Raises:
        SpecError: If they name several.
    """
    first, *others = parse_addresses(location, words)
    if others:
        second = others[0].location if others[0].step is None else others[0].step
        raise SpecError(
            what=f"{second} was given besides the first step.",
            why="this command takes one step.",
            fix=f"ckpttools ... {first.location}, or run the command once for each.",
        )
    return first


def parse_pair_of_steps(location: str | pathlib.Path, words: Iterable[str]) -> tuple[StepAddress, StepAddress]:
    """Return the two steps that the arguments of a comparison name; the newest and one other for `RUN 20`.

    Raises:
        SpecError: If they do not name two.
    """
    found = parse_addresses(location, words)
    if len(found) == 1 and found[0].step is not None:
        found = [StepAddress(found[0].location), *found]
    if len(found) != 2:
        raise SpecError(
            what=f"{len(found)} steps were given.",
            why="two steps are compared.",
            fix=f"ckpttools diff {location} 500 1000, or two directories of steps.",
        )
    return found[0], found[1]


def locate_steps(location: str | pathlib.Path, words: Iterable[str]) -> tuple[pathlib.Path, tuple[int, ...]]:
    """Return the run and the numbers of the steps that the arguments name, for commands that write to a run.

    Raises:
        CheckpointError: If a location is not a run or a step of one, no step is named, or the runs differ.
    """
    runs: dict[pathlib.Path, list[int | None]] = {}
    for address in parse_addresses(location, words):
        run, number = _split_step_directory(address.location)
        step = number if address.step is None else address.step
        runs.setdefault(require_whole_run(pathlib.Path(run)), []).append(step)
    unnamed = next((root for root, numbers in runs.items() if None in numbers), None)
    if unnamed is not None:
        raise SpecError(
            what=f"no step of {unnamed} was named.",
            why="the command writes to a step.",
            fix=f"{unnamed / '500'}, or {unnamed} 500.",
        )
    if len(runs) > 1:
        raise SpecError(
            what=f"the steps are of several runs: {', '.join(map(str, runs))}.",
            why="a command writes to one run.",
            fix="run the command once for each run.",
        )
    ((root, steps),) = runs.items()
    return root, tuple(step for step in steps if step is not None)


def _is_elsewhere(word: str, run: str | pathlib.Path) -> bool:
    """Return whether a number is the name of a directory that is not the run's step, which it is inside the run."""
    directory, step = pathlib.Path(word), pathlib.Path(run, word)
    return directory.is_dir() and not (step.is_dir() and directory.samefile(step))


def _split_step_directory(location: str | pathlib.Path) -> tuple[str | pathlib.Path, int | None]:
    """Return the run and the number of a step's directory, which need not exist; any other location is returned."""
    if isinstance(location, pathlib.Path):
        found = path_kinds.identify(location)
        step = layout.parse_step_number(found.path.name)
        if step is not None and found.kind in ("step", "foreign step", "missing") and found.path.parent.is_dir():
            return found.path.parent, step
    return location, None


def require_whole_run(path: pathlib.Path) -> pathlib.Path:
    """Return the directory of a run, for commands that take no single step.

    Raises:
        CheckpointError: If it is not a directory, or is that of one step.
    """
    found = path_kinds.identify(path)
    if found.kind == "step" or (found.kind == "foreign step" and layout.parse_step_number(path.name) is not None):
        raise CheckpointError(
            what=f"{path} is one step of a run.",
            why="this command takes a whole run; it would find no steps in the directory of one.",
            fix=f"ckpttools ... {os.path.normpath(path / '..')}",
        )
    return require_run_directory(path)


def parse_pairs(pairs: Iterable[str]) -> dict[str, str]:
    """Return the values of several NAME=VALUE by name.

    Raises:
        SpecError: If one has no "=", or two have the same name.
    """
    found: dict[str, str] = {}
    for name, value in map(parse_pair, pairs):
        if name in found:
            raise SpecError(
                what=f"{name!r} was given twice: {name}={found[name]} and {name}={value}.",
                why="one of the two would be dropped; nothing was done.",
                fix=f"{name}={value}",
            )
        found[name] = value
    return found


def parse_pair(text: str) -> tuple[str, str]:
    """Return both sides of NAME=VALUE."""
    name, separator, value = text.partition("=")
    if not separator:
        raise SpecError(what=f"{text!r} has no '='.", why="the option assigns a value to a name.", fix=f"{text}=...")
    return name, value
