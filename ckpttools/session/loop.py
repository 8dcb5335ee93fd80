# SPDX-License-Identifier: Apache-2.0
"""The steps of a training loop: whether a step is saved, which step is the last, and when the loop stops.

With several processes the leader decides for all of them, once per step.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ..errors import NotRestoredError, StepOrderError
from ..save.outcomes import Outcome, Skipped
from ..spec.triggers import StepContext
from .advice import MetricWatch, warn
from .progress import RunProgress
from .resources import RunResources
from .saver import Saver
from .signals import StopRequest


class TrainingLoop:
    """The steps of one session.

    Args:
        resources: The open run.
        close: Closes the session; called at exit if a background save is still in progress then.

    Attributes:
        progress: Where the run stands.
        saver: Makes the saves.
        stop_request: Whether this process was asked to stop.
    """

    def __init__(self, resources: RunResources, close: Callable[[], None]) -> None:
        spec = resources.spec
        self.progress = RunProgress(spec.save, resources.run)
        self.saver = Saver(resources, self.progress, close)
        self.stop_request = StopRequest()
        self._resources = resources
        self._metric_watch = MetricWatch({*spec.save.get_metric_names(), *spec.get_metric_modes()})
        self._final_step: int | None = None
        self._is_writing = False
        self._is_stopping = False
        self._is_closed = False

    def begin(self) -> None:
        """Check that this process may continue the run, and make it the only one that does.

        Raises:
            StepOrderError: If the session is closed.
            NotRestoredError: If the run has steps and none was restored.
            RunInUseError: If another process writes to the run.
        """
        if self._is_closed:
            raise StepOrderError(
                what=f"the run in {self._resources.directory} is closed.",
                why="after the with block nothing waits for a background save or reports its error.",
                fix="call step() and save() inside `with ct.open(spec) as ckpt:`.",
            )
        if not self.progress.has_begun:
            if self._resources.run.is_used():
                raise NotRestoredError(
                    what=f"{self._resources.directory} holds steps and none was restored.",
                    why="training from the start would supersede the run that is there.",
                    fix="report = ckpt.restore(state) before the loop, or another directory for a new run.",
                )
            self.progress.begin()
        if not self._is_writing:
            self._resources.group.broadcast("the beginning", self._begin_writing)
            self._is_writing = True

    def _begin_writing(self) -> None:
        self._resources.run.lock_for_writing()
        self.progress.branch()
        # Copies what an earlier session could not copy.
        self._resources.update_mirror()

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

    def _iterate(self, total: int) -> Iterator[int]:
        self._final_step = total
        self.stop_request.install_handlers()
        for step in range(self.progress.step + 1, total + 1):
            yield step
            if self._is_stopping:
                return
        # No later step could act on a request to stop, so from here a signal does what it did before the loop.
        self.stop_request.restore_handlers()
        if self.progress.step < total:
            warn(
                f"the final step {total} was not passed to step(), so it is not saved. Call ckpt.step(step, state) "
                "at the end of every step; it saves only when the spec says so."
            )

    def step(self, step: int, state: Mapping[str, Any], metrics: Mapping[str, Any]) -> Outcome:
        """Save a completed step if it is due, the last, or the one to stop after; see `Session.step`."""
        self.begin()
        self.stop_request.install_handlers()
        context = self.progress.make_context(step, metrics)
        is_final = step == self._final_step
        group = self._resources.group
        group.request_stop(self.stop_request.get_reason(step))
        verdict = group.broadcast(f"step {step}", lambda: self._decide(context))
        finished = self.saver.wait() if verdict["ended"] else None
        warn(self._metric_watch.add(metrics, is_last=is_final))
        stop: str | None = verdict["stop"]
        if stop:
            self.stop_request.reason = stop
        if not (stop or is_final or verdict["due"]):
            self.progress.step = step
            return Skipped(step=step, reason=f"not due: {verdict['reason']}", finished=finished)
        reason = stop or ("the final step" if is_final else verdict["reason"])
        outcome = self.saver.save(
            context, state, metrics, reason=reason, finished=finished, blocking=bool(stop) or is_final
        )
        self._is_stopping = bool(stop)
        return outcome

    def _decide(self, context: StepContext) -> dict[str, Any]:
        """What all processes do at this step, as plain data."""
        has_ended = self.saver.has_ended
        stop = self.stop_request.reason or self._resources.group.get_stop_request()
        if self.saver.failure is not None:
            # It is raised next, in all processes.
            return {"ended": has_ended, "stop": stop, "due": False, "reason": ""}
        decision = self.progress.decide(context)
        return {"ended": has_ended, "stop": stop, "due": decision.save, "reason": decision.reason}

    def save(self, step: int, state: Mapping[str, Any], metrics: Mapping[str, Any], reason: str) -> Outcome:
        """Save a step whatever the triggers say; see `Session.save`."""
        self.begin()
        finished = self.saver.wait()
        context = self.progress.make_context(step, metrics, minimum=0)
        return self.saver.save(context, state, metrics, reason=reason, finished=finished)

    def close(self) -> None:
        """Refuse further steps, and restore the previous signal handlers."""
        self._is_closed = True
        self.stop_request.restore_handlers()
