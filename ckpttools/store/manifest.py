# SPDX-License-Identifier: Apache-2.0
"""The manifest: what a step is, file by file and leaf by leaf, with its own checksum.

Three lines of JSON: a seal (format and the digest of the other two lines), a summary, and the contents. A directory is
a step when its seal fits and the files of its summary exist with their sizes; its name proves nothing. The summary is
separate because opening a run reads it for every step, and the contents, a hundred times longer, for one.

Data only: no name in it is imported, and no path in it may leave the step's directory.
"""

import dataclasses
import functools
import json
import math
import os
import pathlib
import stat
from collections.abc import Mapping
from typing import Any

from ..errors import CorruptStepError, IncompleteStepError, StepDamagedError, UntrustedStepError, VersionError
from ..spec.state import DEFAULT_RULES, Exclude
from ..tree.leaf_paths import Path, is_below
from ..tree.records import Record
from . import digest, layout

FORMAT = 1
MAX_BYTES = 1 << 30
"""A manifest above this size is refused unread; one of a million leaves takes about 200 MB."""

_MAX_SAVED_AT_S = 253_402_214_400
"""The end of the year 9999, in seconds since the epoch."""

type Lineage = tuple[tuple[str, int], ...]
"""Branches since the start of the run, each with the step after which it began; see `catalogue`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Summary:
    """What the catalogue needs from a step.

    Attributes:
        step: Completed updates.
        sequence: Order of the commits, from 1.
        saved_at: Seconds since the epoch.
        run_s: Seconds of training up to this step.
        metrics: Recorded metrics.
        lineage: The branches that led to the step; the last one is its own.
        reason: Why it was saved.
        spec: Fingerprint of the spec that saved it.
        files: Size and digest of each file of the step, by its path with slashes; the manifest is not among them.
    """

    step: int
    sequence: int
    saved_at: float
    run_s: float
    metrics: dict[str, float]
    lineage: Lineage
    reason: str
    spec: str
    files: dict[str, tuple[int, str]]

    @property
    def total_bytes(self) -> int:
        """Bytes of all files."""
        return sum(size for size, _ in self.files.values())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Item:
    """The leaves of one item of the state, and the containers of its stateful objects."""

    records: tuple[Record, ...]
    skeletons: Mapping[Path, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Contents:
    """What a restore needs beyond the summary.

    Attributes:
        items: The state, item by item.
        triggers: What the triggers remember after this save.
        outputs: What the validation function returned, if the run has one.
        state_version: The user's version of the structure of the state.
        surgery: Operations that were applied in this run before, as code: each is applied once.
        exclude: The rules by which variables were excluded.
        excluded: The names of the excluded parts, each with the type or pattern that excluded it.
        processes: How many processes saved it.
        local: Leaves and stateful objects whose value differs in a process other than the leader, by the number of
            the process and then by item.
    """

    items: dict[str, Item]
    triggers: Any = None
    outputs: Any = None
    state_version: int = 1
    surgery: tuple[str, ...] = ()
    exclude: tuple[Exclude, ...] = DEFAULT_RULES
    excluded: tuple[tuple[str, str], ...] = ()
    processes: int = 1
    local: Mapping[int, Mapping[str, Item]] = dataclasses.field(default_factory=dict)

    def get_process_items(self, index: int, count: int) -> dict[str, Item]:
        """Return the items as one of `count` processes is to restore them."""
        mine = self.local.get(index, {}) if count == self.processes else {}
        return {
            name: item if name not in mine else _overlay_item(item, mine[name]) for name, item in self.items.items()
        }

    def find_local_paths(self, count: int) -> set[tuple[str, Path]]:
        """Return the leaves and stateful objects, by item and path, that only fit the same number of processes."""
        if count == self.processes:
            return set()
        parts = [(name, item) for items in self.local.values() for name, item in items.items()]
        return {(name, path) for name, item in parts for path in (*item.skeletons, *(r.path for r in item.records))}


def _overlay_item(item: Item, local: Item) -> Item:
    """Return an item with the values of one process in place of the leader's."""
    replaced = {record.path: record for record in local.records}
    records = tuple(
        replaced.pop(record.path, record) for record in item.records if not is_below(record.path, local.skeletons)
    )
    return Item(records=(*records, *replaced.values()), skeletons={**item.skeletons, **local.skeletons})


@dataclasses.dataclass(frozen=True)
class Manifest:
    """A manifest whose seal was checked; the contents are parsed on first use."""

    summary: Summary
    contents_json: bytes

    @functools.cached_property
    def contents(self) -> Contents:
        """The contents.

        Raises:
            CorruptStepError: If they are not in the form that this version writes.
        """
        return _decode_contents(_parse(self.contents_json))


def write(directory: pathlib.Path, summary: Summary, contents: Contents, *, algorithm: str) -> None:
    """Write the manifest of a step into its (staged) directory; it is synced with the rest of the tree."""
    (directory / layout.MANIFEST).write_bytes(serialize(summary, contents, algorithm=algorithm))


def serialize(summary: Summary, contents: Contents, *, algorithm: str) -> bytes:
    """Return the bytes of a manifest."""
    plain = {**dataclasses.asdict(summary), "metrics": {k: _encode_float(v) for k, v in summary.metrics.items()}}
    body = b"\n".join(map(_dump, (plain, _encode_contents(contents))))
    # The format is stored twice: the digest does not cover the seal, and damage must not look like a newer format.
    seal = {"ckpttools": FORMAT, "format": FORMAT, "digest": digest.hash_bytes(algorithm, body)}
    return _dump(seal) + b"\n" + body


def read(directory: pathlib.Path) -> Manifest:
    """Read a step's manifest and check its seal, its step number and its files' sizes.

    Raises:
        IncompleteStepError: If the manifest or a file is missing or of the wrong size.
        CorruptStepError: If the manifest's bytes are not those that were written.
        UntrustedStepError: If it names a path outside the step's directory or is absurdly large.
        OSError: If the disk does not answer, which is not damage.
    """
    manifest = read_sealed(directory)
    number = layout.parse_step_number(directory.name.partition("-")[0])
    # A copy of a step may have any name; another number would be another step.
    if number not in (None, manifest.summary.step):
        raise CorruptStepError(
            what=f"{directory.name}/{layout.MANIFEST} belongs to step {manifest.summary.step}.",
            why="the manifest or the whole directory was replaced or renamed.",
        )
    _require_files(directory, manifest.summary)
    return manifest


def read_sealed(directory: pathlib.Path) -> Manifest:
    """Read a manifest and check only its seal, not the files beside it."""
    return parse_manifest(_read_bytes(directory))


def _read_bytes(directory: pathlib.Path) -> bytes:
    path = directory / layout.MANIFEST
    try:
        status = path.lstat()
    except FileNotFoundError as error:
        raise IncompleteStepError(
            what=f"{directory.name} has no {layout.MANIFEST}.",
            why="the manifest is the last file of a save: the save was not finished, or ckpttools did not make it.",
            fix="ct.adopt(directory) adopts the steps that plain Orbax wrote.",
        ) from error
    if not stat.S_ISREG(status.st_mode):
        raise UntrustedStepError(what=f"{directory.name}/{layout.MANIFEST} is not a regular file.")
    if status.st_size > MAX_BYTES:
        raise UntrustedStepError(
            what=f"{directory.name}/{layout.MANIFEST} has {status.st_size} bytes.",
            why=f"more than {MAX_BYTES} bytes are not read.",
        )
    return path.read_bytes()


def parse_manifest(data: bytes) -> Manifest:
    """Check the seal and parse the summary.

    Raises:
        VersionError: If a newer version wrote it.
        CorruptStepError: If its bytes are not those that were written.
    """
    damaged = {"what": f"the {layout.MANIFEST} is damaged.", "why": "its bytes do not match its checksum."}
    first, _, body = data.partition(b"\n")
    seal = _parse(first)
    if not isinstance(seal, dict) or not isinstance(seal.get("digest"), str):
        raise CorruptStepError(**damaged)
    number = seal.get("ckpttools")
    if type(number) is int and number > FORMAT and seal.get("format") == number:
        raise VersionError(
            what=f"the {layout.MANIFEST} has format {number}.",
            why=f"a newer version of ckpttools wrote it; this one reads formats up to {FORMAT}. Nothing was changed.",
            fix="install the version that wrote it, or restore(step=...) an older step by its number.",
        )
    if digest.hash_bytes(digest.get_algorithm(seal["digest"]), body) != seal["digest"]:
        raise CorruptStepError(**damaged)
    lines = body.split(b"\n")
    if number != FORMAT or len(lines) != 2:
        raise CorruptStepError(**damaged)
    return Manifest(_decode_summary(_parse(lines[0])), lines[1])


def _require_files(directory: pathlib.Path, summary: Summary) -> None:
    missing, sizes = [], []
    for name, (size, _) in summary.files.items():
        # Strings instead of Path objects: a run of a thousand steps has tens of thousands of files.
        try:
            status = os.lstat(f"{directory}/{name}")
        except (FileNotFoundError, NotADirectoryError):
            missing.append(name)
            continue
        if not stat.S_ISREG(status.st_mode):
            raise _make_link_error(directory, name)
        if status.st_size != size:
            sizes.append(f"{name} has {status.st_size} of {size} bytes")
    if missing or sizes:
        error = IncompleteStepError(
            what=f"step {summary.step} is incomplete: {'; '.join([f'{name} is missing' for name in missing] + sizes)}."
        )
        error.step, error.files = summary.step, (*missing, *(text.split(" has ")[0] for text in sizes))
        raise error


def require_no_links(directory: pathlib.Path, summary: Summary) -> None:
    """Raise `UntrustedStepError` if a directory of the step is a link; checked before a step is read, not when listed.

    Files are checked at every listing, along with their sizes.
    """
    parents: set[str] = set()
    for name in summary.files:
        parent = name.rpartition("/")[0]
        while parent and parent not in parents:
            parents.add(parent)
            parent = parent.rpartition("/")[0]
    for parent in parents:
        if os.path.islink(f"{directory}/{parent}"):
            raise _make_link_error(directory, parent)


def _make_link_error(directory: pathlib.Path, name: str) -> UntrustedStepError:
    return UntrustedStepError(
        what=f"{directory.name}/{name} is a link or not a regular file.",
        why="a step consists of its own files; a link could lead outside the run.",
    )


def _decode_summary(data: Any) -> Summary:
    try:
        summary = Summary(
            **{
                **data,
                "metrics": {str(name): float(value) for name, value in data["metrics"].items()},
                "lineage": tuple((str(branch), int(start)) for branch, start in data["lineage"]),
                "files": {
                    _require_safe_path(name): (int(size), str(mark)) for name, (size, mark) in data["files"].items()
                },
            }
        )
    except StepDamagedError:
        raise
    except (TypeError, ValueError, KeyError, AttributeError, OverflowError) as error:
        raise CorruptStepError(what=f"the summary of the {layout.MANIFEST} cannot be read: {error}.") from error
    counts = all(type(value) is int for value in (summary.step, summary.sequence))
    clocks = all(isinstance(value, int | float) for value in (summary.saved_at, summary.run_s))
    # A date outside the calendar would make every listing of the run fail.
    clocks = clocks and 0 <= summary.saved_at < _MAX_SAVED_AT_S and math.isfinite(summary.run_s)
    if not (counts and clocks and summary.lineage and isinstance(summary.reason, str)):
        raise CorruptStepError(what=f"the summary of the {layout.MANIFEST} has values that are out of range.")
    return summary


def _require_safe_path(name: str) -> str:
    parts = name.split("/")
    if "" in parts or "." in parts or ".." in parts or "\0" in name or "\\" in name:
        raise UntrustedStepError(
            what=f"the manifest names the file {name!r}.",
            why="a path in a manifest may not leave the step's directory.",
            fix="do not restore from this directory; it was tampered with.",
        )
    return name


def _encode_contents(contents: Contents) -> Any:
    plain = {"items": encode_items(contents.items), "triggers": contents.triggers, "outputs": contents.outputs}
    if contents.processes > 1:
        plain["processes"] = contents.processes
        plain["local"] = {str(index): encode_items(items) for index, items in contents.local.items()}
    if contents.surgery:
        plain["surgery"] = list(contents.surgery)
    if contents.exclude != DEFAULT_RULES:
        plain["exclude"] = [dataclasses.asdict(rule) for rule in contents.exclude]
    if contents.excluded:
        plain["excluded"] = [list(pair) for pair in contents.excluded]
    return plain if contents.state_version == 1 else {**plain, "state_version": contents.state_version}


def encode_items(items: Mapping[str, Item]) -> dict[str, Any]:
    """Return items as plain data."""
    return {name: _encode_item(item) for name, item in items.items()}


def _encode_item(item: Item) -> dict[str, Any]:
    plain: dict[str, Any] = {
        "leaves": [record.to_json() for record in item.records],
        "skeletons": [[list(path), skeleton] for path, skeleton in item.skeletons.items()],
    }
    # By the index of the leaf; absent if no leaf has it, so that other manifests keep the bytes of earlier versions.
    if weak := [index for index, record in enumerate(item.records) if record.weak_type]:
        plain["weak_type"] = weak
    if variables := {str(index): record.variable for index, record in enumerate(item.records) if record.variable}:
        plain["variables"] = variables
    return plain


def decode_items(data: Any) -> dict[str, Item]:
    """Return the items that `encode_items` encoded; invalid data raises."""
    return {str(name): _decode_item(item) for name, item in data.items()}


def _decode_item(data: Any) -> Item:
    weak, variables = set(data.get("weak_type", ())), data.get("variables", {})
    records = (
        Record.from_json({**leaf, "weak_type": index in weak, "variable": variables.get(str(index), "")})
        for index, leaf in enumerate(data["leaves"])
    )
    skeletons = {tuple(path): skeleton for path, skeleton in data["skeletons"]}
    return Item(records=tuple(records), skeletons=skeletons)


def _decode_contents(data: Any) -> Contents:
    try:
        return Contents(
            items=decode_items(data["items"]),
            processes=int(data.get("processes", 1)),
            local={int(index): decode_items(items) for index, items in data.get("local", {}).items()},
            triggers=data["triggers"],
            outputs=data["outputs"],
            state_version=int(data.get("state_version", 1)),
            surgery=tuple(map(str, data.get("surgery", ()))),
            exclude=tuple(Exclude(**rule) for rule in data["exclude"]) if "exclude" in data else DEFAULT_RULES,
            excluded=tuple((str(name), str(reason)) for name, reason in data.get("excluded", ())),
        )
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        if isinstance(error, StepDamagedError):
            raise
        raise CorruptStepError(what=f"the contents of the {layout.MANIFEST} cannot be read: {error}.") from error


def _dump(data: Any) -> bytes:
    return json.dumps(data, separators=(",", ":")).encode()


def _parse(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise CorruptStepError(
            what=f"the {layout.MANIFEST} is damaged.", why=f"a line of it is not valid JSON: {error}."
        ) from error


def _encode_float(value: float) -> float | str:
    # JSON has no NaN; `float` reads these words back.
    return value if math.isfinite(value) else str(value)
