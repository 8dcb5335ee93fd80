# SPDX-License-Identifier: Apache-2.0
"""Identify a path: a run, one of its steps, an item of a step, another program's checkpoints, or something else.

Every command that takes a path calls `identify`, so that a wrong path is never mistaken for an empty or intact run, and
a new run never begins inside or beside an old one.
"""

import contextlib
import dataclasses
import os
import pathlib
import re
from typing import Literal

from ..errors import NotARunError
from . import catalogue, commit, layout, manifest
from .formats import foreign_layouts

type Kind = Literal[
    "missing", "file", "empty", "run", "step", "inside", "foreign run", "foreign step", "mirror", "parent", "unknown"
]

_COPY = re.compile(r"(0|[1-9][0-9]{0,17})-[0-9a-f]{8}")
_SHOWN_STEPS = 5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Contents:
    """What a path is.

    Attributes:
        path: The path, absolute.
        kind: "inside" for an item or a deeper part of a step, and for a run's control directory; "foreign step" for one
            checkpoint of another program and "foreign run" for a directory of them; "parent" for a directory of runs
            that is not one itself; "unknown" for any other directory without steps.
        text: A sentence that begins with the path.
        use: The path that was probably meant; for a foreign run or step the path itself.
        step: Number of the step; None if it is not a step or has no number.
    """

    path: pathlib.Path
    kind: Kind
    text: str
    use: pathlib.Path
    step: int | None = None


def identify(path: str | os.PathLike[str]) -> Contents:
    """Return what a path is; reads names and the manifest of a step.

    Args:
        path: Any path; it need not exist. Links are followed.

    Raises:
        StorageError: If the disk cannot be read or permissions are missing.
    """
    place = pathlib.Path(os.path.abspath(path))
    with commit.wrap_os_errors(f"{place} cannot be read"):
        if place.is_symlink() and place.exists():
            place = place.resolve()  # `best -> 500` is step 500, and a link to an item is inside a step
        return _identify_part(place) or _identify_whole(place)


def _identify_part(place: pathlib.Path) -> Contents | None:
    """Return what a path is if it is a step or part of one, or of a control directory; None otherwise."""
    if (place / layout.MANIFEST).exists():
        step = read_step_number(place)
        text = f"{place} is {'a step' if step is None else f'step {step}'} of a run."
        return Contents(path=place, kind="step", text=text, use=place, step=step)
    for parent in place.parents:
        if (parent / layout.MANIFEST).exists():
            step = read_step_number(parent)
            named = f"the step {parent}" if step is None else f"step {step} of the run {parent.parent}"
            part = f"the item {place.name!r} of" if parent == place.parent and place.is_dir() else "inside"
            return Contents(path=place, kind="inside", text=f"{place} is {part} {named}.", use=parent)
    if layout.CONTROL_DIRECTORY in place.parts:
        run = pathlib.Path(*place.parts[: place.parts.index(layout.CONTROL_DIRECTORY)])
        return Contents(path=place, kind="inside", text=f"{place} is in the control directory of {run}.", use=run)
    for parent in place.parents:
        if foreign_layouts.is_orbax_checkpoint(parent):
            item = parent == place.parent and foreign_layouts.is_bare(place)
            text = f"{place} is {f'the item {place.name!r} of' if item else 'inside'} the Orbax checkpoint {parent}."
            return Contents(path=place, kind="inside", text=text, use=parent)
    return None


def _identify_whole(place: pathlib.Path) -> Contents:
    if not os.path.lexists(place):
        return Contents(path=place, kind="missing", text=f"{place} does not exist.", use=place)
    if (found := foreign_layouts.recognize(place)) is not None:
        kind = "file" if found == "msgpack" else "checkpoint"
        text = f"{place} is a {kind} written by {foreign_layouts.describe_writer(place)}."
        return Contents(
            path=place, kind="foreign step", text=text, use=place, step=foreign_layouts.parse_number(place.name) or 0
        )
    if not place.is_dir():
        return Contents(path=place, kind="file", text=f"{place} is a file, not a directory.", use=place.parent)
    return _identify_directory(place)


def _identify_directory(place: pathlib.Path) -> Contents:
    names = {name for name in os.listdir(place) if name != layout.CONTROL_DIRECTORY}
    numbered = {name for name in names if layout.parse_step_number(name) is not None and (place / name).is_dir()}
    left = foreign_layouts.find_foreign_files(place)
    if text := _describe_foreign_run(place, numbered, left):
        return Contents(path=place, kind="foreign run", text=text, use=place)
    has_step = any((place / name / layout.MANIFEST).exists() for name in numbered)
    runs = [] if has_step else sorted(name for name in names if _is_run(place / name))
    if runs and not layout.get_control_path(place).is_dir():
        shown = ", ".join(runs[:_SHOWN_STEPS]) + (", ..." if len(runs) > _SHOWN_STEPS else "")
        text = f"{place} is not a run, but contains {len(runs)} run(s): {shown}."
        return Contents(path=place, kind="parent", text=text, use=place / runs[0])
    if numbered or (place / layout.CONTROL_DIRECTORY / "superseded").is_dir():
        return Contents(path=place, kind="run", text=f"{place} is a run.", use=place)
    if any(_COPY.fullmatch(name) and (place / name / layout.MANIFEST).exists() for name in names):
        text = f"{place} is a mirror: it contains copies of a run's steps."
        return Contents(path=place, kind="mirror", text=text, use=place)
    if not names:
        return Contents(path=place, kind="empty", text=f"{place} is an empty directory.", use=place)
    shown = ", ".join(sorted(names)[:_SHOWN_STEPS]) + (", ..." if len(names) > _SHOWN_STEPS else "")
    text = f"{place} contains no steps, only {shown}."
    return Contents(path=place, kind="unknown", text=text, use=place)


def _is_run(directory: pathlib.Path) -> bool:
    """Return whether a directory directly contains steps, of ours or of another program; False if it is unreadable."""
    with contextlib.suppress(OSError):
        if directory.is_dir() and foreign_layouts.recognize(directory) is None:
            numbered = (path for path in directory.iterdir() if layout.parse_step_number(path.name) is not None)
            steps = ((path / layout.MANIFEST).exists() or foreign_layouts.recognize(path) for path in numbered)
            return any(steps) or bool(foreign_layouts.find_foreign_files(directory).steps)
    return False


def _describe_foreign_run(place: pathlib.Path, numbered: set[str], left: foreign_layouts.ForeignFiles) -> str:
    """Return a sentence about another program's checkpoints; "" if there are none, or our own steps are the newest."""
    without = {name for name in numbered if not (place / name / layout.MANIFEST).exists()}
    if without or left.steps:
        # The manifests are read only here: they decide whether a step without one is ours and has lost it.
        entries = catalogue.scan(place).entries
        unverified = [entry for entry in entries if entry.state == "unverified"]
        newest = max((entry.step for entry in entries if entry.state != "unverified"), default=-1)
        if unverified and max(entry.step for entry in unverified) > newest:
            last = unverified[-1]
            names = [entry.path.name for entry in unverified]
            shown = f"{'..., ' if len(names) > _SHOWN_STEPS else ''}{', '.join(names[-_SHOWN_STEPS:])}"
            writer = foreign_layouts.describe_writer(last.path)
            return f"{place} contains {len(names)} step(s) written by {writer}: {shown}."
    if numbered or left.steps:
        return ""
    if left.unnumbered:
        shown = ", ".join(path.name for path in left.unnumbered[:_SHOWN_STEPS])
        return (
            f"{place} contains checkpoints written by {foreign_layouts.describe_writer(left.unnumbered[0])}: {shown}."
        )
    if left.unfinished:
        shown = ", ".join(path.name for path in left.unfinished[:_SHOWN_STEPS])
        return f"{place} contains only saves that Orbax did not finish: {shown}."
    return ""


def read_step_number(directory: pathlib.Path) -> int | None:
    """Return the number of a step from its manifest, or from its name if the manifest is damaged; None without both."""
    try:
        return manifest.read_sealed(directory).summary.step
    except (OSError, ValueError):
        return layout.parse_step_number(directory.name.partition("-")[0])


def make_not_a_run_error(found: Contents, why: str) -> NotARunError:
    """Return the error for a path that a function does not accept.

    Args:
        found: What the path is.
        why: What would have happened otherwise.
    """
    error = NotARunError(what=found.text, why=why, fix=suggest_fix(found))
    error.kind, error.path = found.kind, found.path
    return error


def suggest_fix(found: Contents) -> str:
    """Return what to type instead of a path that a function does not accept."""
    path, parent = found.use, found.use.parent
    match found.kind:
        case "step":
            return f"the run is {parent}; start a new run in a directory outside it."
        case "inside":
            return f"use {path}."
        case "parent":
            own = layout.get_control_path(parent)
            return f"{path} is one of the runs; if another one is to begin beside them here: mkdir {own}"
        case "foreign run" if foreign_layouts.find_foreign_files(path).unfinished and not _has_checkpoints(path):
            return "delete it if no process is writing it, or use another directory."
        case "foreign run" if not catalogue.scan(path).entries:
            first = foreign_layouts.find_foreign_files(path).unnumbered[0]
            return f'ct.adopt({str(first)!r}, into="runs/new"), or `ckpttools adopt {first} --into runs/new`.'
        case "foreign run":
            return f"ct.adopt({str(path)!r}), or `ckpttools adopt {path}`; ct.load also reads it without adoption."
        case "foreign step":
            return f'ct.adopt({str(path)!r}, into="runs/new"), or `ckpttools adopt {path} --into runs/new`.'
        case "mirror":
            return f'pass it as the mirror of its run: ct.CheckpointSpec(..., mirror="{path.as_uri()}").'
        case "missing" | "file":
            return "check the path."
        case _:
            return "check the path: a run is a directory with a numbered directory for each step."


def _has_checkpoints(path: pathlib.Path) -> bool:
    left = foreign_layouts.find_foreign_files(path)
    return bool(left.unnumbered or left.steps or catalogue.scan(path).entries)


def require_startable(path: str | os.PathLike[str]) -> None:
    """Raise `NotARunError` unless a run can be continued, or started, in a directory."""
    found = identify(path)
    if found.kind not in ("missing", "empty", "run", "unknown"):
        why = "a run that started here would hide the old checkpoints or mix with them; nothing was changed."
        raise make_not_a_run_error(found, why)
    require_outside_steps(found.path, "the run there takes the directory for a damaged step of its own and moves it.")


def require_outside_steps(path: str | os.PathLike[str], why: str) -> None:
    """Raise `NotARunError` if a path is in a step of a run or in its control directory, or has the place of a step.

    Args:
        path: What is to be written.
        why: What would happen otherwise.
    """
    found = identify(path)
    if found.kind in ("step", "inside"):
        raise make_not_a_run_error(found, why)
    for place in (found.path, *found.path.parents):
        if layout.parse_step_number(place.name) is not None and _holds_steps(place.parent, place):
            error = NotARunError(
                what=f"{found.path} is {'at' if place == found.path else 'inside'} the place of step {place.name} of "
                f"the run {place.parent}.",
                why=why,
                fix=f"use a path outside of {place.parent}, or one whose name is not a number.",
            )
            error.kind, error.path = "inside", found.path
            raise error


def _holds_steps(directory: pathlib.Path, besides: pathlib.Path) -> bool:
    """Return whether a directory is a run, judged without one of its entries, which may be another run."""
    control = layout.get_control_path(directory)
    with contextlib.suppress(OSError):
        names = {path.name for path in directory.iterdir() if path != besides}
        if any(
            layout.parse_step_number(name) is not None and (directory / name / layout.MANIFEST).exists()
            for name in names
        ):
            return True
        # A run that is open and has no steps yet. An earlier `ct.open` of the parent of several runs leaves this, too.
        return control.is_dir() and _identify_whole(besides).kind != "run"
    return False
