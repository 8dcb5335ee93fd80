# SPDX-License-Identifier: Apache-2.0
"""Errors of ckpttools, in the what/why/fix form that both packages share.

The lowest room. Failures of a stored step come in four classes, because the remedies differ: incomplete and corrupt
steps are passed over for an older one; a structure that does not fit and a disk that does not answer are raised, since
an older step would not help and starting again would lose the run.
"""

from typing import Any

from remattools.errors import ExplainedError as ExplainedError
from remattools.errors import suggest_names as suggest_names


class CheckpointError(ExplainedError):
    """Base of every error that ckpttools raises on purpose."""


class SpecError(CheckpointError, ValueError):
    """A value of a `CheckpointSpec` that cannot be honoured."""


class SpecFileError(SpecError):
    """A file with a spec that cannot be read; the message names file and line."""


class LeafError(CheckpointError, TypeError):
    """A leaf of the state that cannot be stored."""


class StructureError(CheckpointError, ValueError):
    """The state passed in and the state on disk differ in structure.

    Attributes:
        mismatches: One line for each leaf that is missing, unexpected, of another shape or of another dtype.
        surgery: Operations that would make the step fit; a guess, to be passed to `restore` if it is the intent.
    """

    mismatches: tuple[str, ...] = ()
    surgery: tuple[Any, ...] = ()


class VersionError(StructureError):
    """A step with an unknown version of the format or of the user's state; the step is not damaged."""


class PlacementError(CheckpointError, RuntimeError):
    """A leaf that cannot be placed on its devices; the live objects are as they were before the restore.

    Attributes:
        leaves: Names of the leaves, as far as known.
    """

    leaves: tuple[str, ...] = ()


class StepDamagedError(CheckpointError, ValueError):
    """Base of what a restore passes over: two kinds of damage, and steps that the run's validation rejects.

    Attributes:
        step: The damaged step; None if unknown.
        leaves: Paths of the damaged leaves, as far as known.
        files: Damaged files, relative to the step's directory.
    """

    default_why = "what is stored is not what was saved."
    default_fix = "restore another step: `ckpttools ls --verify` lists the intact ones."
    step: int | None = None
    leaves: tuple[str, ...] = ()
    files: tuple[str, ...] = ()

    def __init__(self, what: str, why: str = "", fix: str = "") -> None:
        super().__init__(what, why or self.default_why, fix or self.default_fix)


class IncompleteStepError(StepDamagedError):
    """A step whose manifest or files are missing or too short."""

    default_why = "a part of what was saved is missing."
    default_fix = "`ckpttools repair` restores metadata; else restore another step, which `ckpttools ls` lists."


class CorruptStepError(StepDamagedError):
    """A step whose bytes are not those that were written."""

    default_why = "some bytes are not those that were written."
    default_fix = (
        "`ckpttools repair` restores metadata, a mirror has arrays; else restore another step: "
        "`ckpttools ls --verify` lists the intact ones."
    )


class StepRejectedError(StepDamagedError):
    """An intact step whose model does not pass the run's validation function."""

    default_why = "its bytes are intact, so the validation function, its batch or the model's code has changed."
    default_fix = "undo that change, or open the run without validate= if it was intended."


class UntrustedStepError(CorruptStepError):
    """A step with content that ckpttools never writes: a path out of the run, an absurd size, a link."""

    default_why = "ckpttools never writes such a step, so somebody has changed the directory."
    default_fix = "do not use the directory of the step before you know who wrote it."


class StepNotFoundError(CheckpointError, LookupError):
    """A step requested by number or metric does not exist."""


class NoIntactStepError(CheckpointError, LookupError):
    """The directory holds steps and none of them can be restored.

    Attributes:
        report: The `RestoreReport` with every candidate and why it was rejected.
    """

    report: Any = None


class NotRestoredError(CheckpointError, RuntimeError):
    """Training would continue in a used directory without `restore`."""


class StepOrderError(CheckpointError, ValueError):
    """A step number that cannot come next."""


class StorageError(CheckpointError, OSError):
    """The disk refused to read or write."""


class DiskSpaceError(StorageError):
    """Too little room for the next step."""


class RunInUseError(StorageError):
    """Another process writes to this directory."""


class MirrorError(StorageError):
    """The store of a mirror does not answer, or loses what it is given; local steps are unaffected."""


class TensorFileError(CheckpointError, ValueError):
    """A file to import that is not a whole safetensors file."""


class SaveTimeoutError(CheckpointError, TimeoutError):
    """A wait for the disk took longer than the spec allows."""


class ProcessError(CheckpointError, RuntimeError):
    """Another process of the same run failed, died, left, or is doing something else.

    Attributes:
        missing: Whether it did not answer, so that it may still be writing.
    """

    missing: bool = False


class ValidationError(CheckpointError, ValueError):
    """The model's outputs do not survive saving, or are not finite."""


class CheckpointWarning(UserWarning):
    """Advice: something works but costs more, or protects less, than it should."""
