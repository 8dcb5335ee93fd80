# SPDX-License-Identifier: Apache-2.0
"""Errors of ckpttools, in the what/why/fix form that both packages share.

The lowest room. Failures of a stored step come in four classes, because what may be done about them differs:
incomplete and corrupt steps are passed over for an older one; a structure that does not fit and a disk that does
not answer are raised, since an older step would not help and starting afresh would lose the run.
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
    """The state passed in and the state on disk are of different structure.

    Attributes:
        mismatches: One line for each leaf that is missing, unexpected, of another shape or of another dtype.
        surgery: Operations that would make the step fit; a guess, to be passed to `restore` if it is what is meant.
    """

    mismatches: tuple[str, ...] = ()
    surgery: tuple[Any, ...] = ()


class VersionError(StructureError):
    """A step of a version of the format, or of the user's state, that is not known here; nothing is wrong with it."""


class StepDamagedError(CheckpointError, ValueError):
    """Base of what recovery passes over: two kinds of damage, and steps that the run's validation rejects.

    Attributes:
        step: The damaged step, or None where it cannot be told.
        leaves: Paths of the damaged leaves, as far as they are known.
        files: Damaged files, relative to the step's folder.
    """

    default_why = "what is stored is not what was saved."
    default_fix = "restore another step: `ckpttools ls --verify` says which are intact."
    step: int | None = None
    leaves: tuple[str, ...] = ()
    files: tuple[str, ...] = ()

    def __init__(self, what: str, why: str = "", fix: str = "") -> None:
        super().__init__(what, why or self.default_why, fix or self.default_fix)


class IncompleteStepError(StepDamagedError):
    """A step whose manifest or files are missing or too short."""

    default_why = "a part of what was saved is not there."
    default_fix = "`ckpttools repair` puts metadata back; else restore another step, which `ckpttools ls` lists."


class CorruptStepError(StepDamagedError):
    """A step whose bytes are not those that were written."""

    default_why = "some bytes are not those that were written."
    default_fix = (
        "`ckpttools repair` puts metadata back, a mirror has arrays; else restore another step: "
        "`ckpttools ls --verify` says which are intact."
    )


class StepRejectedError(StepDamagedError):
    """A step whose bytes are as they were saved, and whose model does not pass the run's validation function."""

    default_why = (
        "its bytes are as they were saved, so the validation function, its batch or the model's code has changed."
    )
    default_fix = "undo that change, or open the run without validate= if it was meant."


class UntrustedStepError(CorruptStepError):
    """A step that asks for something no honest step asks for: a path out of the run, an absurd size, a link."""

    default_why = "no step that was saved here asks for it, so somebody has changed the folder."
    default_fix = "do not use the folder before you know who wrote it."


class StepNotFoundError(CheckpointError, LookupError):
    """A step that was asked for by number or metric and is not there."""


class NoIntactStepError(CheckpointError, LookupError):
    """The directory holds steps and none of them can be restored.

    Attributes:
        report: The `RestoreReport` with every candidate and why it was rejected.
    """

    report: Any = None


class NotRestoredError(CheckpointError, RuntimeError):
    """Training was about to go on in a used directory without `restore`."""


class StepOrderError(CheckpointError, ValueError):
    """A step number that cannot come next."""


class StorageError(CheckpointError, OSError):
    """The disk refused to read or write."""


class DiskSpaceError(StorageError):
    """Too little room for the next step."""


class RunInUseError(StorageError):
    """Another process writes to this directory."""


class MirrorError(StorageError):
    """The store of a mirror does not answer, or does not keep what it is given; local steps are as they were."""


class TensorFileError(CheckpointError, ValueError):
    """A file that was to be imported and is no whole safetensors file."""


class SaveTimeoutError(CheckpointError, TimeoutError):
    """A wait for the disk took longer than the spec allows."""


class ProcessError(CheckpointError, RuntimeError):
    """Another process of the same run failed, died, left, or is doing something else.

    Attributes:
        missing: Whether it was not heard of, so that it may still be writing.
    """

    missing: bool = False


class ValidationError(CheckpointError, ValueError):
    """The model's outputs do not survive saving, or are not finite."""


class CheckpointWarning(UserWarning):
    """Advice: something works and costs more, or protects less, than it should."""
