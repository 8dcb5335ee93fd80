# SPDX-License-Identifier: Apache-2.0
"""The end of a session: save the last step after an exception, wait for what is in progress, release what is held."""

from ..errors import CheckpointError
from .advice import warn
from .last_step import LastStep
from .loop import TrainingLoop
from .resources import RunResources


class Closing:
    """Close one session, also in the middle of an interrupt, and as often as it is requested.

    Args:
        resources: The open run.
        loop: The session's loop.
    """

    def __init__(self, resources: RunResources, loop: TrainingLoop) -> None:
        self._resources = resources
        self._loop = loop

    def close(self, *, raise_errors: bool) -> None:
        """Wait for the save in progress and its copy at the mirror, and release signal handlers and the lock.

        Args:
            raise_errors: Whether to raise the error of the save in progress; False to warn of it instead.
        """
        guard = self._resources.guard
        if guard.is_forked:
            return  # The save, its thread and the lock are the parent's.
        try:
            guard.run(lambda: self._wait_and_release(raise_errors=raise_errors))
        finally:
            # Also if this was interrupted: a save in progress goes on by itself and keeps the lock until it has ended.
            if guard.current_call is None:
                self._release()

    def _wait_and_release(self, *, raise_errors: bool) -> None:
        waits = not self._loop.stop_request.is_repeated
        try:
            try:
                if waits:
                    self._loop.saver.wait()
            finally:
                if waits:
                    self._resources.close_mirror()
        except CheckpointError as failure:
            if raise_errors:
                raise
            # Another error is being raised; this one must neither hide it nor be lost.
            warn(f"the save in progress failed: {failure}")
        finally:
            self._release()

    def _release(self) -> None:
        self._loop.close()
        self._resources.group.close()
        self._loop.saver.close()


def save_last_step(resources: RunResources, loop: TrainingLoop, last: LastStep, error: BaseException) -> str:
    """Save the last completed step after an exception; return why it was not saved, as a sentence.

    Args:
        resources: The open run.
        loop: The session's loop.
        last: The last completed step.
        error: What ended the loop.

    Returns:
        The obstacle; "" if it was saved, or there was nothing to save.
    """
    if last.step <= loop.progress.saved_step:
        return ""
    if loop.stop_request.is_repeated:
        return "A second signal arrived."
    if resources.group.count > 1:
        return "With several processes, an exception in one of them saves nothing."
    try:
        changed = last.find_changed_leaf()
        if changed:
            return f"{changed} has changed since step {last.step}."
        resources.warn_of_mirror()
        reason = f"{type(error).__name__} ended the loop"
        resources.guard.run(lambda: loop.save(last.step, last.state, last.metrics, reason))
    except Exception as failure:
        # Whatever the state's own code raises must not hide the error that ended the loop.
        return f"The save raised {type(failure).__name__}: {failure}"
    return ""
