# SPDX-License-Identifier: Apache-2.0
"""The processes of one run: who leads, what the leader decides, and what all of them have done.

Messages go through the key-value store of `jax.distributed`, in which every wait has a time limit. Collectives would
hang where a process is missing, make every step wait for the device, and must not run beside the training's own. A
process that leaves says so; one that dies is missed by its heartbeat, since JAX itself takes 100 s to notice it and
then ends all others. If process 0 dies, which holds the store, JAX ends the others at once.

A process alone is a group too, whose calls return at once.
"""

import itertools
import json
import threading
import time
from collections.abc import Callable
from typing import Any

import jax

from ..errors import CheckpointError, ProcessError
from ..store import orbax

_HEARTBEAT_S = 1.0
_LOST_AFTER_S = 20.0
_POLL_S = 0.5
"""How long one question to the store may take before somebody looks whether there is still somebody to answer."""
_GRACE_S = 5.0
"""What the leader's answer may take longer than its wait for the others."""
_CLEANUP_INTERVAL = 1000

_group_ids = itertools.count()


class Group:
    """A process that is alone."""

    index = 0
    count = 1

    @property
    def is_leader(self) -> bool:
        """Whether this process decides, commits and deletes."""
        return self.index == 0

    def broadcast(self, topic: str, make: Callable[[], Any], *, channel: str = "main") -> Any:
        """What `make` returns in the leader, as plain data, in every process.

        Raises:
            ProcessError: If it raised there, or the leader is not heard of.
        """
        return make()

    def all_gather(self, topic: str, value: Any, *, channel: str = "main") -> list[Any]:
        """The values of all processes, in their order; a barrier.

        Raises:
            ProcessError: If a process is not heard of.
        """
        return [value]

    def raise_if_any_failed(self, topic: str, error: BaseException | None, *, channel: str = "main") -> None:
        """Go on only if all can.

        Raises:
            ProcessError: If another process has an error; an own error is raised as it is.
        """
        if error is not None:
            raise error

    def run_on_all[T](self, topic: str, make: Callable[[], T]) -> T:
        """What `make` returns here, if it succeeds everywhere.

        Raises:
            ProcessError: If it fails in another process; an own error is raised as it is.
        """
        try:
            value = make()
        except CheckpointError as error:
            self.raise_if_any_failed(topic, error)
            raise
        self.raise_if_any_failed(topic, None)
        return value

    def request_stop(self, reason: str | None) -> None:
        """Tell the leader that this process was asked to stop."""

    def get_stop_request(self) -> str | None:
        """What any process wished for, to be asked by the leader."""
        return None

    def close(self) -> None:
        """Tell the others that nothing more comes from here."""


class MultiprocessGroup(Group):
    """One of several processes.

    Args:
        index: Its number.
        count: How many there are.
        timeout_s: How long to wait for the others.
    """

    def __init__(self, index: int, count: int, timeout_s: float) -> None:
        self.index, self.count = index, count
        self._timeout_s = timeout_s
        # Every process opens the same runs in the same order.
        self._key_prefix = f"ckpttools/{next(_group_ids)}"
        self._store = orbax.get_coordination_store()
        self._message_counts: dict[str, int] = {}
        self._deleted_counts: dict[str, int] = {}
        self._last_heartbeats: dict[int, tuple[str | None, float]] = {}
        self._has_requested_stop = False
        self._closed = threading.Event()
        self._heartbeat_thread = threading.Thread(target=self._send_heartbeats, name="ckpttools-heartbeat", daemon=True)
        self._heartbeat_thread.start()

    def broadcast(self, topic: str, make: Callable[[], Any], *, channel: str = "main") -> Any:
        """See `Group.decide`."""
        if self._message_counts.get(channel, 0) % _CLEANUP_INTERVAL == _CLEANUP_INTERVAL - 1:
            self.all_gather("tidy", None, channel=channel)
        key = self._make_next_key(channel)
        if not self.is_leader:
            return self._unpack_message(
                topic, 0, self._receive(f"{key}/0", 0, topic, time.monotonic() + self._timeout_s)
            )
        try:
            value = make()
        except CheckpointError as error:
            self._send(f"{key}/0", topic, error=error)
            raise
        self._send(f"{key}/0", topic, value)
        return value

    def all_gather(self, topic: str, value: Any, *, channel: str = "main") -> list[Any]:
        """See `Group.exchange`."""
        key = self._make_next_key(channel)
        deadline = time.monotonic() + self._timeout_s
        if not self.is_leader:
            self._send(f"{key}/{self.index}", topic, value)
            answer = self._receive(f"{key}/all", 0, topic, deadline + _GRACE_S)
            return list(self._unpack_message(topic, 0, answer))
        values = [value]
        try:
            for other in range(1, self.count):
                letter = self._receive(f"{key}/{other}", other, topic, deadline)
                values.append(self._unpack_message(topic, other, letter))
        except ProcessError as error:
            self._send(f"{key}/all", topic, error=error)
            raise
        self._send(f"{key}/all", topic, values)
        self._delete_old_messages(channel)
        return values

    def raise_if_any_failed(self, topic: str, error: BaseException | None, *, channel: str = "main") -> None:
        """See `Group.agree`."""
        texts = self.all_gather(topic, None if error is None else _format_error(error), channel=channel)
        if error is not None:
            raise error
        failed = [index for index, text in enumerate(texts) if text is not None]
        if failed:
            raise ProcessError(
                what=f"{topic}: process {failed[0]} of {self.count} failed: {texts[failed[0]]}",
                why="what one process cannot do, none of them does; all committed steps are as they were.",
                fix="look at the output of that process.",
            )

    def request_stop(self, reason: str | None) -> None:
        """See `Group.wish`."""
        if reason is not None and not self._has_requested_stop:
            self._has_requested_stop = True
            self._store.key_value_set(f"{self._key_prefix}/wish/{self.index}", reason)

    def get_stop_request(self) -> str | None:
        """See `Group.wishes`."""
        return next((f"{text} (process {index})" for index, text in self._read_all("wish").items()), None)

    def close(self) -> None:
        """See `Group.leave`."""
        if not self._closed.is_set():
            self._closed.set()
            self._heartbeat_thread.join(2 * _POLL_S)
            try:
                self._store.key_value_set(f"{self._key_prefix}/left/{self.index}", "")
            except jax.errors.JaxRuntimeError:
                return  # The store is gone, and with it everybody who could be told.

    def _make_next_key(self, channel: str) -> str:
        self._message_counts[channel] = self._message_counts.get(channel, 0) + 1
        return f"{self._key_prefix}/{channel}/{self._message_counts[channel]}"

    def _delete_old_messages(self, channel: str) -> None:
        """Delete what was told before an exchange: whoever takes part has read all of it."""
        turn = self._message_counts[channel]
        for old in range(self._deleted_counts.get(channel, 0) + 1, turn):
            self._store.key_value_delete(f"{self._key_prefix}/{channel}/{old}/")
        self._deleted_counts[channel] = turn - 1

    def _send(self, key: str, topic: str, value: Any = None, *, error: BaseException | None = None) -> None:
        letter = {"topic": topic, "value": value} if error is None else {"topic": topic, "error": _format_error(error)}
        try:
            self._store.key_value_set(key, json.dumps(letter))
        except jax.errors.JaxRuntimeError as failure:
            raise self._make_lost_service_error(topic, failure) from failure

    def _receive(self, key: str, sender: int, topic: str, deadline: float) -> dict[str, Any]:
        """Wait for a letter of another process."""
        while True:
            try:
                return dict(json.loads(self._store.blocking_key_value_get(key, int(_POLL_S * 1000))))
            except jax.errors.JaxRuntimeError as failure:
                if "DEADLINE_EXCEEDED" not in str(failure):
                    raise self._make_lost_service_error(topic, failure) from failure
            missing = self._describe_absence(sender)
            if missing or time.monotonic() > deadline:
                error = ProcessError(
                    what=f"{topic}: process {sender} of {self.count} is missing: "
                    + (missing or f"nothing came from it within {self._timeout_s:g} s."),
                    why="several processes save and restore together: each calls the same methods in the same order. "
                    "All committed steps are as they were.",
                    fix="look at the output of that process and start the run again; "
                    "Storage(timeout_s=...) sets how long to wait for a slow one.",
                )
                error.missing = True
                raise error

    def _describe_absence(self, sender: int) -> str:
        """Why nothing more is to be expected of a process; empty while it lives."""
        if str(sender) in self._read_all("left"):
            return "it has closed the run."
        beat = self._read_all("beat").get(str(sender), "")
        last, since = self._last_heartbeats.get(sender, (None, 0.0))
        if beat != last:
            self._last_heartbeats[sender] = beat, time.monotonic()
            return ""
        silent_s = time.monotonic() - since
        return f"it has given no sign of life for {silent_s:.0f} s." if silent_s > _LOST_AFTER_S else ""

    def _read_all(self, part: str) -> dict[str, str]:
        return {
            key.rpartition("/")[2]: value for key, value in self._store.key_value_dir_get(f"{self._key_prefix}/{part}/")
        }

    def _unpack_message(self, topic: str, sender: int, message: dict[str, Any]) -> Any:
        if "error" in message:
            raise ProcessError(
                what=f"{topic}: process {sender} of {self.count} gave up: {message['error']}",
                why="what one process cannot do, none of them does; all committed steps are as they were.",
                fix="look at the output of that process.",
            )
        if message["topic"] != topic:
            raise ProcessError(
                what=f"process {self.index} is at {topic!r} and process {sender} at {message['topic']!r}.",
                why="several processes save and restore together: each calls the same methods in the same order.",
                fix="call the session's methods in every process, not under `if jax.process_index() == 0`.",
            )
        return message["value"]

    def _make_lost_service_error(self, topic: str, failure: Exception) -> ProcessError:
        return ProcessError(
            what=f"{topic}: jax.distributed's coordination service does not answer: {str(failure).splitlines()[0]}",
            why="process 0 holds it, and has most likely ended. All committed steps are as they were.",
            fix="look at the output of process 0 and start the run again.",
        )

    def _send_heartbeats(self) -> None:
        for number in itertools.count():
            try:
                self._store.key_value_set(f"{self._key_prefix}/beat/{self.index}", str(number), allow_overwrite=True)
            except jax.errors.JaxRuntimeError:
                return
            if self._closed.wait(_HEARTBEAT_S):
                return


def _format_error(error: BaseException) -> str:
    """An error in one line for another process."""
    return f"{type(error).__name__}: {getattr(error, 'what', error)}"


def get_process_index_and_count() -> tuple[int, int]:
    """The number of this process and how many there are; asks for no device unless there are several."""
    return (jax.process_index(), jax.process_count()) if jax.distributed.is_initialized() else (0, 1)


def make_group(timeout_s: float) -> Group:
    """The processes that jax.distributed has brought together; one that is alone without it."""
    index, count = get_process_index_and_count()
    return Group() if count == 1 else MultiprocessGroup(index, count, timeout_s)
