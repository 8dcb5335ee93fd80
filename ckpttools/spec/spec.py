# SPDX-License-Identifier: Apache-2.0
"""`CheckpointSpec`: the whole of a run's checkpointing as one frozen, hashable, comparable value.

Pure: building a spec touches no disk. Every field is checked when the value is built, so what exists is legal and a
spec that can be written down can be run.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any, Literal, Self

from ..errors import SpecError
from . import spec_file
from .mirror import Mirror, as_mirror
from .retention import Best, Latest, Retention
from .state import DEFAULT_RULES, Exclude, StateVersion, as_rules, as_state_version
from .storage import Integrity, Storage
from .triggers import EverySteps, OnImprovement, Trigger


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointSpec:
    """When a run is saved, what is kept, and how it is verified.

    Attributes:
        directory: The run's directory on a POSIX file system. A relative one is resolved when the run is opened; one
            from a file, against the directory of that file.
        save: When to save.
        keep: What to keep.
        storage: How bytes reach the disk.
        integrity: How a step is verified.
        mirror: Where each step is copied to: an address such as "s3://bucket/run", or a `Mirror`.
        state_version: The version of the state's structure: a number, or a `StateVersion` with the migrations that
            bring steps of older versions up to it.
        exclude: Which variables are not saved: by default those that flax recomputes, `nnx.Cache` and
            `nnx.Intermediate`. A rule, or several in a tuple; () saves everything.

    Examples:
        >>> spec = CheckpointSpec(directory="runs/exp1", save=EverySteps(500), keep=Latest(3))
        >>> CheckpointSpec.from_toml(spec.to_toml()) == spec
        True
    """

    directory: pathlib.Path | str
    save: Trigger = dataclasses.field(default_factory=lambda: EverySteps(1000))
    keep: Retention = dataclasses.field(default_factory=lambda: Latest(3))
    storage: Storage = dataclasses.field(default_factory=Storage)
    integrity: Integrity = dataclasses.field(default_factory=Integrity)
    mirror: Mirror | str | None = None
    state_version: StateVersion | int = 1
    exclude: Exclude | tuple[Exclude, ...] = DEFAULT_RULES

    def __post_init__(self) -> None:
        named = isinstance(self.directory, str | os.PathLike) and str(self.directory).strip()
        if not named or "\0" in str(self.directory):
            raise SpecError(
                what=f"CheckpointSpec(directory={self.directory!r}) does not name a directory.",
                why="every step of the run is a directory below it.",
                fix='CheckpointSpec(directory="runs/exp1")',
            )
        if "://" in str(self.directory):
            raise SpecError(
                what=f"CheckpointSpec(directory={str(self.directory)!r}) is an address, not a directory.",
                why="a commit needs rename and fsync, which object stores do not have.",
                fix='directory="runs/exp1", mirror="s3://bucket/run" copies every step there.',
            )
        object.__setattr__(self, "directory", pathlib.Path(self.directory))
        object.__setattr__(self, "mirror", as_mirror(self.mirror))
        object.__setattr__(self, "state_version", as_state_version(self.state_version))
        object.__setattr__(self, "exclude", as_rules(self.exclude))
        kinds = {"save": Trigger, "keep": Retention, "storage": Storage, "integrity": Integrity}
        examples = {
            "save": "save=EverySteps(500)",
            "keep": "keep=Latest(3)",
            "storage": "storage=Storage(asynchronous=False)",
            "integrity": 'integrity=Integrity(digest="xxh3")',
        }
        for field, kind in kinds.items():
            if not isinstance(getattr(self, field), kind):
                raise SpecError(
                    what=f"CheckpointSpec({field}={getattr(self, field)!r}) is of the wrong kind.",
                    why=f"{field} must be a {kind.__name__}.",
                    fix=examples[field],
                )

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read the `[checkpoint]` table of a run file.

        Raises:
            SpecFileError: If the file cannot be read or a value in it is wrong; the message names file and line.
        """
        path = pathlib.Path(path)
        fields = spec_file.read_file(path)
        return cls(**{**fields, "directory": path.resolve().parent / fields["directory"]})

    @classmethod
    def from_toml(cls, text: str) -> Self:
        """Read the `[checkpoint]` table of `text`."""
        return cls(**spec_file.read(text, source="<text>"))

    def to_toml(self) -> str:
        """Return the `[checkpoint]` table that `from_toml` reads back to an equal spec."""
        return spec_file.write(self)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read the JSON that `to_json` writes."""
        return cls(**spec_file.read_json(text, source="<text>"))

    def to_json(self) -> str:
        """Return the spec as JSON of the same form as its TOML."""
        return json.dumps(spec_file.encode(self), indent=2)

    def get_metric_modes(self) -> dict[str, Literal["min", "max"]]:
        """Return the metrics that have a direction in the spec, those of `keep` before those of `save`."""

        def visit(value: Any) -> Iterator[tuple[str, Literal["min", "max"]]]:
            if isinstance(value, Best | OnImprovement):
                yield value.metric, value.mode
            for part in getattr(value, "parts", ()):
                yield from visit(part)

        found: dict[str, Literal["min", "max"]] = {}
        for metric, mode in (*visit(self.keep), *visit(self.save)):
            found.setdefault(metric, mode)
        return found

    def fingerprint(self) -> str:
        """Return a short hash that changes when the spec does; recorded with every step."""
        try:
            text = json.dumps({**spec_file.encode(self), "directory": ""}, sort_keys=True)
        except SpecError:
            # A user-defined trigger has no file form, so its name is hashed.
            text = repr(dataclasses.replace(self, directory="-"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]
