# SPDX-License-Identifier: Apache-2.0
"""The steps of a training loop: whether a step is saved, which step is the last, and when the loop stops.

With several processes the leader decides for all of them, once per step.

A process has at most one session that writes to a run. A later session closes an earlier one, which most often was left
open by a notebook cell that is run again.
"""

import pathlib
import signal
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ..errors import CheckpointError, NotRestoredError, RunInUseError, StepOrderError
from ..save.outcomes import Outcome, Skipped
from ..spec.triggers import StepContext
from .advice import MetricWatch, warn
from .progress import RunProgress
from .resources import RunResources
from .saver import Saver
from .signals import StopRequest

_writers: dict[pathlib.Path, "weakref.ref[TrainingLoop]"] = {}
"""The session of this process that writes to a run, by the run's directory."""


class TrainingLoop:
    """The steps of one session.

    Args:
        resources: The open run.
        close: Closes the session; called at exit if a background save is still in progress then.
        signals: The signals that ask the loop to stop.

    Attributes:
        progress: The position of the run.
        saver: Makes the saves.
        stop_request: Whether this process was asked to stop.
    """

    def __init__(self, resources: RunResources, close: Callable[[], None], signals: tuple[signal.Signals, ...]) -> None:
        spec = resources.spec
        self.progress = RunProgress(spec.save, resources.run)
        self.saver = Saver(resources, self.progress, close)
        self._close_session = close
        self.stop_request = StopRequest(signals)
        self._resources = resources
        self._metric_watch = MetricWatch({*spec.save.get_metric_names(), *spec.get_metric_modes()})
        self._final_step: int | None = None
        self._is_writing = False
        self._is_stopping = False
        self._is_closed = False
        self._is_iterated = False
        self._passed_step = 0
        self._is_superseded = False
        self._has_described = False

    def begin(self) -> None:
        """Check that this process may continue the run, and make it the only one that does.

        Raises:
            StepOrderError: If the session is closed.
            NotRestoredError: If the run has steps and none was restored.
            RunInUseError: If another process writes to the run.
        """
        if self._is_superseded:
            raise RunInUseError(
                what=f"a later session of this process has opened {self._resources.directory} and writes to it.",
                why="two sessions would delete each other's steps, so this one was closed.",
                fix="use the later session; a second run needs another directory.",
            )
        if self._is_closed:
            raise StepOrderError(
                what=f"the run in {self._resources.directory} is closed.",
                why="after the with block, nothing would wait for a background save or report its error.",
                fix="call step() and save() inside `with ct.open(spec) as ckpt:`.",
            )
        self.saver.leave_interrupted()
        if not self.progress.has_begun:
            if self._resources.run.is_used():
                raise NotRestoredError(
                    what=f"{self._resources.directory} holds steps and none was restored.",
                    why="training from scratch would supersede them.",
                    fix="report = ckpt.restore(state) before the loop, or another directory for a new run.",
                )
            self.progress.begin()
        if not self._is_writing:
            self._resources.group.broadcast("the beginning", self._begin_writing)
            self._is_writing = True

    def _begin_writing(self) -> None:
        other = self._get_other_writer()
        if other is not None:
            other.supersede()
        _writers[self._resources.directory.resolve()] = weakref.ref(self)
        self._resources.run.lock_for_writing()
        if self.progress.next_sequence != self._resources.run.get_steps().next_sequence:
            self._resources.run.lock.release()
            raise NotRestoredError(
                what=f"{self._resources.directory} has steps that were saved since this session restored it.",
                why="going on from the older state would supersede them.",
                fix="report = ckpt.restore(state) continues from them; ckpt.restore(state, step=...) begins a branch.",
            )
        if unforeseen := self.progress.list_unforeseen_steps():
            self._resources.run.lock.release()
            names = ", ".join(map(str, unforeseen))
            raise NotRestoredError(
                what=f"the restore passed over step {names} of {self._resources.directory}, which is in its place now.",
                why="it was repaired or saved again, or could not be moved; going on would supersede it.",
                fix="report = ckpt.restore(state) tries it again; ckpt.restore(state, step=...) begins a branch.",
            )
        self.progress.branch()
        # Copy the steps that an earlier session could not copy.
        self._resources.update_mirror()

    def _get_other_writer(self) -> "TrainingLoop | None":
        reference = _writers.get(self._resources.directory.resolve())
        other = None if reference is None else reference()
        return other if other is not self and other is not None and other._resources.run.lock.is_held else None

    def wait_for_other_writer(self) -> None:
        """Wait for the save in progress of an earlier session of this process, so that a restore finds its step.

        Also if that session is closed: its `close` may have been interrupted while it waited.
        """
        other = self._get_other_writer()
        if other is not None and other._resources.guard.current_call is None:
            try:
                other.saver.wait()
            except CheckpointError as failure:
                warn(f"the save in progress of an earlier session failed: {failure}")

    def supersede(self) -> None:
        """Close the session, because a later one of this process writes to the run.

        Raises:
            RunInUseError: If the session is executing a call.
        """
        if self._resources.guard.current_call is not None:
            raise RunInUseError(
                what=f"another session of this process is writing to {self._resources.directory}.",
                why="two sessions would delete each other's steps.",
                fix="use that session, or another directory for this run; reading needs no lock.",
            )
        self._is_superseded = True
        try:
            if not self._is_closed:
                self._close_session()
            # Also if it was closed: an interrupt may have come before the lock was released.
            self.saver.close()
        except CheckpointError as failure:
            warn(f"an earlier session of this process was closed: {failure}")

    def iterate(self, total: int) -> Iterator[int]:
        """Return an iterator over the steps after the current one, up to `total`; see `Session.steps`."""
        self.begin()
        if type(total) is not int or total < 0:
            raise StepOrderError(
                what=f"steps({total!r}) is not a number of steps.",
                why="it yields the steps up to and including that number.",
                fix="steps(10_000)",
            )
        return self._iterate(total)

    def describe_unsaved(self, error: BaseException | None = None, obstacle: str = "") -> str | None:
        """Return once which completed steps are not saved, if the loop ended early; None if nothing is lost.

        Args:
            error: What ended the loop; None if no error did.
            obstacle: Why `save_on_exception` did not save the last step, as a sentence.
        """
        first, last = self.progress.saved_step + 1, self.progress.step
        has_ended_early = self._final_step is not None and not self._is_iterated
        if last < first or not (error is not None or has_ended_early) or self._has_described:
            return None
        self._has_described = True
        steps = f"steps {first} to {last} are" if first < last else f"step {last} is"
        newest = f"the newest saved step is {first - 1}" if first > 1 else "no step is saved"
        if self.saver.worker is not None:
            newest += f"; the save of step {self.saver.worker.step} has not ended"
        cause = "the loop ended early" if error is None else f"{type(error).__name__} ended the loop"
        return f"{steps} not saved: {cause}, and {newest}. {obstacle}".rstrip()

    def _iterate(self, total: int) -> Iterator[int]:
        self._final_step = total
        self.stop_request.start_listening()
        step = self.progress.step + 1
        while step <= total:
            origin = self.progress.origin
            yield step
            if self._is_stopping:
                return
            # A restore in the loop's body goes back, and the loop with it.
            step = step + 1 if self.progress.origin is origin else self.progress.step + 1
        self._is_iterated = True
        # No later step could act on a request to stop, so from here on signals have their previous effect.
        self.stop_request.stop_listening()
        if self._passed_step < total:
            warn(
                f"the final step {total} was not passed to step(), so it is not saved. Call ckpt.step(step, state) "
                "at the end of every step; it saves only when the spec says so."
            )

    def step(self, step: int, state: Mapping[str, Any], metrics: Mapping[str, Any]) -> Outcome:
        """Save a completed step if it is due, the last, or the one to stop after; see `Session.step`."""
        self.begin()
        self.stop_request.start_listening()
        context = self.progress.make_context(step, metrics)
        self._passed_step = step
        is_final = step == self._final_step
        group = self._resources.group
        group.request_stop(self.stop_request.get_reason(step))
        verdict = group.broadcast(f"step {step}", lambda: self._decide(context))
        if verdict["ended"]:
            self._wait_for_earlier_save(is_last=bool(verdict["stop"]) or is_final)
        self._watch_metrics(metrics, is_last=is_final)
        stop: str | None = verdict["stop"]
        if stop:
            self.stop_request.ask(stop)
        if not (stop or is_final or verdict["due"]):
            self.progress.pass_step(step)
            reason = f"not due: {verdict['reason']}"
            return Skipped(step=step, reason=reason, finished=self.saver.take_finished())
        reason = stop or ("the final step" if is_final else verdict["reason"])
        outcome = self.saver.save(context, state, metrics, reason=reason, blocking=bool(stop) or is_final)
        self._is_stopping = bool(stop)
        return outcome

    def _watch_metrics(self, metrics: Mapping[str, Any], *, is_last: bool) -> None:
        advice = self._metric_watch.add(metrics, is_last=is_last)
        if advice:
            # A metric may also be recorded later, by another process.
            entries = self._resources.run.get_steps().committed_entries
            recorded = {name for entry in entries if entry.info for name in entry.info.metrics}
            if not self._metric_watch.missing_names <= recorded:
                warn(advice)

    def _wait_for_earlier_save(self, *, is_last: bool) -> None:
        """Fetch the result of a save that has ended; its error must not keep the last step from being saved."""
        try:
            self.saver.wait()
        except CheckpointError as failure:
            if not is_last:
                raise
            warn(f"an earlier save failed: {failure}")

    def _decide(self, context: StepContext) -> dict[str, Any]:
        """Return what all processes do at this step, as plain data."""
        has_ended = self.saver.has_ended
        stop = self.stop_request.reason or self._resources.group.get_stop_request()
        if self.saver.failure is not None and not stop:
            # It is raised next, in all processes, unless this step is the last.
            return {"ended": has_ended, "stop": stop, "due": False, "reason": ""}
        decision = self.progress.decide(context)
        return {"ended": has_ended, "stop": stop, "due": decision.save, "reason": decision.reason}

    def save(self, step: int, state: Mapping[str, Any], metrics: Mapping[str, Any], reason: str) -> Outcome:
        """Save a step whatever the triggers say; see `Session.save`."""
        self.begin()
        context = self.progress.make_context(step, metrics, minimum=0)
        return self.saver.save(context, state, metrics, reason=reason)

    def close(self) -> None:
        """Refuse further steps, and stop listening to signals."""
        self._is_closed = True
        self.stop_request.stop_listening()
