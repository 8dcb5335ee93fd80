# SPDX-License-Identifier: Apache-2.0
"""Errors of ckpttools, in the what/why/fix form that both packages share.

The lowest room. Failures of a stored step come in four classes, because the remedies differ. Incomplete and corrupt
steps are skipped for an older one. A structure that does not fit and a disk that does not answer are raised: an older
step would not help, and starting again would lose the run.
"""

from typing import Any

from remattools.errors import ExplainedError as ExplainedError
from remattools.errors import suggest_names as suggest_names


class CheckpointError(ExplainedError):
    """Base of every error that ckpttools raises on purpose.

    Example:
        >>> import tempfile, ckpttools as ct
        >>> spec = ct.CheckpointSpec(directory=tempfile.mkdtemp())
        >>> with ct.open(spec) as ckpt:
        ...     try:
        ...         ckpt.save(-1, {"count": 1})
        ...     except ct.CheckpointError as error:
        ...         print(type(error).__name__)
        StepOrderError
    """


class SpecError(CheckpointError, ValueError):
    """A value of a `CheckpointSpec` that cannot be honoured.

    Example:
        >>> import ckpttools as ct
        >>> try:
        ...     ct.EverySteps(0)
        ... except ct.SpecError as error:
        ...     print(error.fix)
        EverySteps(n=1)
    """


class SpecFileError(SpecError):
    """A file with a spec that cannot be read; the message names file and line.

    Example:
        >>> import ckpttools as ct
        >>> try:
        ...     ct.CheckpointSpec.from_toml('[checkpoint]\\ndirectory = "run"\\nkeeep = { latest = 3 }')
        ... except ct.SpecFileError as error:
        ...     print(error.fix)
        did you mean 'keep'?
    """


class LeafError(CheckpointError, TypeError):
    """A leaf of the state that cannot be stored.

    Example:
        >>> import tempfile, ckpttools as ct
        >>> spec = ct.CheckpointSpec(directory=tempfile.mkdtemp())
        >>> with ct.open(spec) as ckpt:
        ...     try:
        ...         ckpt.save(1, {"model": {"loss": print}})
        ...     except ct.LeafError as error:
        ...         print(error.what.split()[0])
        model.loss
    """


class StructureError(CheckpointError, ValueError):
    """The state passed in and the state on disk differ in structure.

    Attributes:
        mismatches: One line for each leaf that is missing, unexpected, of another shape or of another dtype.
        surgery: Operations that would make the step fit: a guess, to be passed to `restore` if it is what you mean.

    Example:
        >>> import tempfile, ckpttools as ct
        >>> spec = ct.CheckpointSpec(directory=tempfile.mkdtemp())
        >>> with ct.open(spec) as ckpt:
        ...     saved = ckpt.save(1, {"model": {"w": 1}})
        >>> try:
        ...     ct.load(spec.directory, {"model": {"weight": 0}})
        ... except ct.StructureError as error:
        ...     print(error.surgery[0])
        Rename(pattern='model.w', new='model.weight')
    """

    mismatches: tuple[str, ...] = ()
    surgery: tuple[Any, ...] = ()


class VersionError(StructureError):
    """A step with an unknown version of the format or of the user's state; the step is not damaged.

    Example:
        >>> import dataclasses
        >>> import tempfile, ckpttools as ct
        >>> spec = ct.CheckpointSpec(directory=tempfile.mkdtemp())
        >>> with ct.open(dataclasses.replace(spec, state_version=2)) as ckpt:
        ...     saved = ckpt.save(1, {"count": 1})
        >>> with ct.open(spec) as ckpt:
        ...     try:
        ...         ckpt.restore({"count": 0})
        ...     except ct.VersionError as error:
        ...         print(error.fix)
        run the newer program, or restore(step=...) an older step by its number.
    """


class PlacementError(CheckpointError, RuntimeError):
    """A leaf that cannot be placed on its devices; the live objects are as they were before the restore.

    Attributes:
        leaves: Names of the leaves, as far as known.
    """

    leaves: tuple[str, ...] = ()


class StepDamagedError(CheckpointError, ValueError):
    """Base of the errors for which a restore skips a step: damage, and rejection by the run's validation.

    Attributes:
        step: The damaged step; None if unknown.
        leaves: Paths of the damaged leaves, as far as known.
        files: Damaged files, relative to the step's directory.

    Example:
        >>> import tempfile, ckpttools as ct
        >>> spec = ct.CheckpointSpec(directory=tempfile.mkdtemp())
        >>> with ct.open(spec) as ckpt:
        ...     saved = ckpt.save(1, {"count": 1})
        >>> (spec.directory / "1" / "ckpttools.manifest").unlink()
        >>> try:
        ...     ct.show(spec.directory, 1)
        ... except ct.StepDamagedError as error:
        ...     print(type(error).__name__)
        IncompleteStepError
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
    default_fix = "`ckpttools repair` restores metadata; otherwise restore another step: `ckpttools ls` lists them."


class CorruptStepError(StepDamagedError):
    """A step whose bytes are not those that were written.

    Example:
        >>> import tempfile, ckpttools as ct
        >>> spec = ct.CheckpointSpec(directory=tempfile.mkdtemp())
        >>> with ct.open(spec) as ckpt:
        ...     saved = ckpt.save(1, {"count": 1})
        >>> size = (spec.directory / "1" / "ckpttools.manifest").write_text("{}")
        >>> try:
        ...     ct.show(spec.directory, 1)
        ... except ct.CorruptStepError as error:
        ...     print(error.what)
        the ckpttools.manifest is damaged.
    """

    default_why = "some bytes are not those that were written."
    default_fix = (
        "`ckpttools repair` restores metadata, a mirror has arrays; otherwise restore another step: "
        "`ckpttools ls --verify` lists the intact ones."
    )


class StepRejectedError(StepDamagedError):
    """An intact step whose model does not pass the run's validation function.

    Example:
        >>> import tempfile, ckpttools as ct
        >>> spec = ct.CheckpointSpec(directory=tempfile.mkdtemp())
        >>> with ct.open(spec, validate=lambda state: {"output": 1.0}) as ckpt:
        ...     saved = ckpt.save(1, {"count": 1})
        >>> with ct.open(spec, validate=lambda state: {"output": 2.0}) as ckpt:
        ...     try:
        ...         ckpt.restore({"count": 0}, step=1)
        ...     except ct.StepRejectedError as error:
        ...         print(error.step)
        1
    """

    default_why = "its bytes are intact, so the validation function, its batch or the model's code has changed."
    default_fix = "undo that change, or open the run without validate= if it was intended."


class UntrustedStepError(CorruptStepError):
    """A step with content that ckpttools never writes: a path outside the run, an absurd size, a link."""

    default_why = "ckpttools never writes such a step, so somebody has changed the directory."
    default_fix = "do not use the step's directory until you know who wrote it."


class StepNotFoundError(CheckpointError, LookupError):
    """A step requested by number or metric does not exist.

    Example:
        >>> import tempfile, ckpttools as ct
        >>> try:
        ...     ct.show(tempfile.mkdtemp(), 500)
        ... except ct.StepNotFoundError as error:
        ...     print(error.fix)
        available: no steps.
    """


class NoIntactStepError(CheckpointError, LookupError):
    """The directory holds steps and none of them can be restored.

    Attributes:
        report: The `RestoreReport` with every candidate and why it was rejected.

    Example:
        >>> import tempfile, ckpttools as ct
        >>> spec = ct.CheckpointSpec(directory=tempfile.mkdtemp())
        >>> with ct.open(spec) as ckpt:
        ...     saved = ckpt.save(1, {"count": 1})
        >>> size = (spec.directory / "1" / "ckpttools.manifest").write_text("{}")
        >>> with ct.open(spec) as ckpt:
        ...     try:
        ...         ckpt.restore({"count": 0})
        ...     except ct.NoIntactStepError as error:
        ...         print([each.verdict for each in error.report.candidates])
        ['corrupt']
    """

    report: Any = None


class MetricConflictError(CheckpointError, ValueError):
    """A metric that is already recorded with a different value."""


class NotRestoredError(CheckpointError, RuntimeError):
    """Training would continue in a used directory without `restore`.

    Example:
        >>> import tempfile, ckpttools as ct
        >>> spec = ct.CheckpointSpec(directory=tempfile.mkdtemp())
        >>> with ct.open(spec) as ckpt:
        ...     saved = ckpt.save(1, {"count": 1})
        >>> with ct.open(spec) as ckpt:
        ...     try:
        ...         ckpt.save(2, {"count": 2})
        ...     except ct.NotRestoredError as error:
        ...         print(error.fix.partition(" before")[0])
        report = ckpt.restore(state)
    """


class StepOrderError(CheckpointError, ValueError):
    """A step number that cannot come next.

    Example:
        >>> import tempfile, ckpttools as ct
        >>> spec = ct.CheckpointSpec(directory=tempfile.mkdtemp())
        >>> with ct.open(spec) as ckpt:
        ...     saved = ckpt.save(500, {"count": 500})
        ...     try:
        ...         ckpt.save(400, {"count": 400})
        ...     except ct.StepOrderError as error:
        ...         print(error.what)
        step 400 cannot come after step 500.
    """


class StorageError(CheckpointError, OSError):
    """The disk refused to read or write.

    Example:
        >>> import ckpttools as ct
        >>> try:
        ...     ct.verify("runs/misspelt")
        ... except ct.StorageError as error:
        ...     print(error.fix)
        check the path.
    """


class NotARunError(StorageError, StepNotFoundError):
    """A path that is not a run or a step of ckpttools; the message says what it is.

    Attributes:
        path: The path, absolute.
        kind: What the path is: "missing", "file", "empty", "step", "inside" (part of a step or a run), "foreign run",
            "foreign step", "mirror", "parent" or "unknown".
    """

    path: Any = None
    kind: str = "unknown"


class DiskSpaceError(StorageError):
    """Too little disk space for the next step.

    Example:
        >>> import tempfile, ckpttools as ct
        >>> storage = ct.Storage(asynchronous=False, min_free=10**18)
        >>> with ct.open(ct.CheckpointSpec(directory=tempfile.mkdtemp(), storage=storage)) as ckpt:
        ...     try:
        ...         ckpt.save(1, {"count": 1})
        ...     except ct.DiskSpaceError:
        ...         print(ckpt.all_steps())
        ()
    """


class RunInUseError(StorageError):
    """Another process or session writes to this directory.

    Example:
        >>> import tempfile, ckpttools as ct
        >>> spec = ct.CheckpointSpec(directory=tempfile.mkdtemp())
        >>> with ct.open(spec) as ckpt:
        ...     saved = ckpt.save(1, {"count": 1})
        ...     try:
        ...         ct.prune(spec.directory, ct.Latest(1))
        ...     except ct.RunInUseError as error:
        ...         print(error.why)
        two writers would delete each other's steps.
    """


class MirrorError(StorageError):
    """The store of a mirror does not answer, or does not return what was written; local steps are unaffected.

    Example:
        >>> import tempfile, ckpttools as ct
        >>> try:
        ...     ct.fetch_step(tempfile.mkdtemp(), "nonsense://bucket/run")
        ... except ct.MirrorError as error:
        ...     print(error.what.partition(":")[0])
        nonsense
    """


class TensorFileError(CheckpointError, ValueError):
    """A file to import that is not a complete safetensors file.

    Example:
        >>> import pathlib, tempfile, ckpttools as ct
        >>> file = pathlib.Path(tempfile.mkdtemp(), "model.safetensors")
        >>> size = file.write_text("version https://git-lfs.github.com/spec/v1")
        >>> try:
        ...     ct.import_safetensors(file, {})
        ... except ct.TensorFileError as error:
        ...     print(error.why)
        it does not begin with the length of a header.
    """


class SaveTimeoutError(CheckpointError, TimeoutError):
    """A wait for the disk took longer than the spec allows."""


class ProcessError(CheckpointError, RuntimeError):
    """Another process of the same run failed, died, left, or is doing something else.

    Attributes:
        missing: Whether it did not answer, so that it may still be writing.
    """

    missing: bool = False


class ValidationError(CheckpointError, ValueError):
    """The outputs of `validate` are not finite, or too large to be saved with every step.

    Example:
        >>> import tempfile, ckpttools as ct
        >>> spec = ct.CheckpointSpec(directory=tempfile.mkdtemp())
        >>> with ct.open(spec, validate=lambda state: {"output": float("nan")}) as ckpt:
        ...     try:
        ...         ckpt.save(1, {"count": 1})
        ...     except ct.ValidationError:
        ...         print(ckpt.all_steps())
        ()
    """


class CheckpointWarning(UserWarning):
    """Advice: something works but costs more, or protects less, than it should.

    Example:
        >>> import warnings
        >>> import ckpttools as ct
        >>> with warnings.catch_warnings():
        ...     warnings.simplefilter("ignore", ct.CheckpointWarning)  # no advice inside this block
    """
