# SPDX-License-Identifier: Apache-2.0
"""A session with the methods of Orbax's `CheckpointManager`, for code written for one.

The methods are Orbax's, the behaviour is the session's: a call to `save` saves or raises, the latest step is on disk,
and a damaged step is never restored. Facts that shaped it:

-   such code may restore an old step to inspect it and then continue training. That is not a rollback: only a save with
    a number that the run has passed starts a branch, from the step that was restored last;
-   such code rarely closes its manager, so the run is closed with the object. At interpreter exit that is too late for
    a save in progress, because Python starts no threads any more: a warning says so, and the run stays as it was;
-   Orbax's `check_for_errors` raises, while such code uses it as a query. Here it returns the error, which the next
    `save` or `wait_until_finished` raises.
"""

import os
import pathlib
import warnings
import weakref
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

from ..errors import CheckpointWarning, NotRestoredError, SpecError, StepNotFoundError, StructureError
from ..processes.messages import get_process_index_and_count
from ..restore.report import RestoreReport
from ..save.outcomes import Skipped
from ..session.session import Session
from ..spec.retention import All, Latest, Retention
from ..spec.spec import CheckpointSpec
from ..spec.storage import Storage
from ..store import orbax


class CheckpointManager:
    """A run with the interface of Orbax's manager.

    Args:
        directory: The run directory, created if it does not exist; or a spec, whose `save` triggers are ignored:
            each call to `save` saves.
        options: Orbax's `CheckpointManagerOptions`, with `max_to_keep`, `enable_async_checkpointing` and `create`.
            Without options all steps are kept.

    Attributes:
        session: The underlying session.

    Raises:
        SpecError: If other options are set, or there are several processes.

    Example:
        >>> import tempfile, jax.numpy as jnp
        >>> from ckpttools.functional import CheckpointManager
        >>> with CheckpointManager(tempfile.mkdtemp()) as manager:
        ...     manager.save(1, {"model": {"w": jnp.ones(2)}})
        ...     manager.wait_until_finished()
        ...     manager.all_steps()
        True
        [1]
    """

    def __init__(self, directory: str | os.PathLike[str] | CheckpointSpec, options: Any = None) -> None:
        _require_one_process()
        self.session = Session(_make_spec(directory, options))
        self._restored_step: int | None = None
        self._finalizer = weakref.finalize(self, self.session.close, raise_errors=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._finalizer.detach()
        self.session.__exit__(kind, error, trace)

    @property
    def directory(self) -> pathlib.Path:
        """Return the run directory, absolute."""
        return self.session.directory

    def save(self, step: int, args: Any, *, metrics: Mapping[str, Any] | None = None) -> bool:
        """Save now, in the background unless the options say otherwise.

        Args:
            step: Completed updates.
            args: `ocp.args.Composite(model=ocp.args.StandardSave(state), ...)`, or the items by name as they are.
            metrics: Metrics of this step, by name.

        Returns:
            Whether a save was started; False if this step is already saved.

        Raises:
            NotRestoredError: If the run has steps and none was restored.
        """
        self._resume_from_latest(step)
        items, _ = orbax.get_items(args)
        try:
            return not isinstance(self.session.save(step, items, metrics), Skipped)
        except NotRestoredError as error:
            raise NotRestoredError(
                what=error.what,
                why=error.why,
                fix="load_checkpoint(checkpoint_manager, model) before the first save, or another directory.",
            ) from error

    def _resume_from_latest(self, step: int) -> None:
        self.session.wait()
        newest = self.session.latest_step()
        if newest is not None and self._restored_step not in (None, newest) and step > newest:
            # Restores no leaf: the session continues from the newest step instead of starting a branch.
            self._restored_step = self.session.restore({}).step

    def load(self, items: Mapping[str, Any], step: int | None = None) -> RestoreReport:
        """Restore items by name, live ones in place.

        Args:
            items: Live objects or templates, by name.
            step: Number of the step; None for the newest intact one.

        Raises:
            NoIntactStepError: If the run has steps and none is intact.
            StructureError: If the step does not fit; nothing was changed.
        """
        report = self.session.restore(items, "latest" if step is None else step)
        self._restored_step = report.step
        if report.damaged:
            warnings.warn(f"damaged steps were skipped: {report}", CheckpointWarning, stacklevel=3)
        return report

    def restore(self, step: int | None = None, args: Any = None) -> Any:
        """Restore what `args` holds as templates.

        Args:
            step: Number of the step; None for the newest intact one.
            args: `ocp.args.Composite(model=ocp.args.StandardRestore(state), ...)`, or templates by name.

        Returns:
            A `Composite` with an entry for each name, or the state alone if `args` has no names.

        Raises:
            StepNotFoundError: If the step does not exist, or the run has no steps.
            StructureError: If an item has no template, or the step does not fit.
        """
        items, named = orbax.get_items(args)
        bare = [name for name, template in items.items() if template is None]
        if bare:
            raise StructureError(
                what=f"no template was passed for {', '.join(bare)}.",
                why="without one the step cannot be checked against the state, and lists would be restored as dicts.",
                fix="ocp.args.StandardRestore(nnx.state(model))",
            )
        report = self.load(items, step)
        if report.step is None:
            raise StepNotFoundError(
                what=f"{self.directory} holds no steps.",
                why="nothing was saved there, or the directory is not the one that was saved to.",
                fix="check latest_step() first: it is None for a run without steps.",
            )
        return orbax.make_composite(report.state) if named else report.state["default"]

    def delete(self, step: int) -> None:
        """Delete a committed step; the newest cannot be deleted."""
        self.session.delete(step)

    def pin(self, step: int) -> None:
        """Protect a committed step from the spec's retention."""
        self.session.pin(step)

    def latest_step(self) -> int | None:
        """Return the newest step on disk; None if there is none."""
        return self.session.latest_step()

    def all_steps(self) -> list[int]:
        """Return the steps on disk, in increasing order."""
        return list(self.session.all_steps())

    def wait_until_finished(self) -> None:
        """Wait until the save in progress is on disk, and raise its error."""
        self.session.wait()

    def check_for_errors(self) -> BaseException | None:
        """Return the error of a failed background save, or None; the next save or wait raises it."""
        return self.session.failure

    def close(self) -> None:
        """Wait for the save in progress, raise its error, and release the writer's lock."""
        self._finalizer.detach()
        self.session.close()


def _require_one_process() -> None:
    count = get_process_index_and_count()[1]
    if count > 1:
        raise SpecError(
            what=f"CheckpointManager was made in one of {count} processes.",
            why="it tracks which step was restored last, and processes do not share that.",
            fix="use `with ct.open(spec) as ckpt`, which saves and restores with several processes.",
        )


def _make_spec(directory: str | os.PathLike[str] | CheckpointSpec, options: Any) -> CheckpointSpec:
    if isinstance(directory, CheckpointSpec):
        if options is not None:
            raise SpecError(
                what="a spec and Orbax's options were both passed.",
                why="both say which steps are kept.",
                fix="CheckpointManager(spec)",
            )
        return directory
    changed = _get_changed_options(options)
    keep: Retention = All() if changed.get("max_to_keep") is None else Latest(changed["max_to_keep"])
    storage = Storage(asynchronous=changed.get("enable_async_checkpointing", True))
    if not changed.get("create", True) and not pathlib.Path(directory).is_dir():
        raise SpecError(what=f"{directory} is not a directory.", why="the options set create=False.", fix="create=True")
    return CheckpointSpec(directory=pathlib.Path(directory), keep=keep, storage=storage)


def _get_changed_options(options: Any) -> dict[str, Any]:
    if options is None:
        return {}
    try:
        changed = orbax.get_changed_options(options)
    except TypeError as error:
        raise SpecError(
            what=f"options={options!r:.80} is not a CheckpointManagerOptions: {error}.",
            why="only the options of Orbax's manager are supported.",
            fix="ocp.CheckpointManagerOptions(max_to_keep=3), or CheckpointManager(spec).",
        ) from error
    unknown = sorted(changed.keys() - {"max_to_keep", "enable_async_checkpointing", "create"})
    if unknown:
        raise SpecError(
            what=f"the options set {', '.join(unknown)}.",
            why="those are policies of Orbax's manager; this manager takes them from a spec.",
            fix='CheckpointManager(ct.CheckpointSpec(directory=..., keep=ct.Latest(3) | ct.Best("loss", mode="min")))',
        )
    return changed
