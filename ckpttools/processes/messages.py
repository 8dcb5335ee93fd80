# SPDX-License-Identifier: Apache-2.0
"""The messages between the processes of one run: broadcast, all_gather and barrier, with a time limit on each.

They go through the key-value store of `jax.distributed`. Collectives would hang if a process is missing, make every
step wait for the device, and must not run beside the training's own. A process that leaves says so; one that dies is
noticed by its missing heartbeat, since JAX itself takes 100 s to notice it and then ends all others. If process 0
dies, which holds the store, JAX ends the others at once.

A single process is a group too, whose calls return at once.
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
"""How long one request to the store may take before the sender's heartbeat is checked."""
_GRACE_S = 5.0
"""How much longer the others wait for the leader than the leader waits for them."""
_CLEANUP_INTERVAL = 1000

_group_ids = itertools.count()


class Group:
    """A single process, and the interface of several.

    Attributes:
        index: Index of this process; 0 is the leader.
        count: Number of processes.
    """

    index: int = 0
    count: int = 1

    @property
    def is_leader(self) -> bool:
        """Whether this process decides, commits and deletes."""
        return self.index == 0

    def broadcast(self, topic: str, make: Callable[[], Any], *, channel: str = "main") -> Any:
        """Return what `make` returns in the leader, in every process.

        Args:
            topic: What the message is about, for errors; the same in every process.
            make: Called in the leader only; returns plain data.
            channel: Messages of one channel are sent in order; each thread needs its own.

        Raises:
            ProcessError: If `make` raised in the leader, or the leader does not answer.
        """
        return make()

    def all_gather(self, topic: str, value: Any, *, channel: str = "main") -> list[Any]:
        """Return the values of all processes, by index; a barrier.

        Args:
            topic: What the message is about, for errors; the same in every process.
            value: Plain data.
            channel: Messages of one channel are sent in order; each thread needs its own.

        Raises:
            ProcessError: If a process does not answer.
        """
        return [value]

    def raise_if_any_failed(self, topic: str, error: BaseException | None, *, channel: str = "main") -> None:
        """Raise if any process passes an error; a barrier.

        Args:
            topic: What was done, for errors; the same in every process.
            error: The error of this process, which is raised unchanged; None if it has none.
            channel: Messages of one channel are sent in order; each thread needs its own.

        Raises:
            ProcessError: If another process has an error.
        """
        if error is not None:
            raise error

    def run_on_all[T](self, topic: str, make: Callable[[], T]) -> T:
        """Return what `make` returns in this process, if it succeeds in all of them; a barrier.

        Args:
            topic: What is done, for errors; the same in every process.
            make: Called in every process; its error is raised unchanged.

        Raises:
            ProcessError: If it fails in another process.
        """
        try:
            value = make()
        except CheckpointError as error:
            self.raise_if_any_failed(topic, error)
            raise
        self.raise_if_any_failed(topic, None)
        return value

    def request_stop(self, reason: str | None) -> None:
        """Send the leader the reason why this process was asked to stop; nothing for None."""

    def get_stop_request(self) -> str | None:
        """Return the reason why any process was asked to stop, in the leader; None if none was."""
        return None

    def close(self) -> None:
        """Send the others that this process sends no more messages."""


class MultiprocessGroup(Group):
    """One of several processes.

    Args:
        index: Index of this process; 0 is the leader.
        count: Number of processes.
        timeout_s: How long to wait for the others, in seconds.
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
        """Return what `make` returns in the leader, in every process; see `Group.broadcast`."""
        if self._message_counts.get(channel, 0) % _CLEANUP_INTERVAL == _CLEANUP_INTERVAL - 1:
            self.all_gather("cleanup", None, channel=channel)
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
        """Return the values of all processes, by index; see `Group.all_gather`."""
        key = self._make_next_key(channel)
        deadline = time.monotonic() + self._timeout_s
        if not self.is_leader:
            self._send(f"{key}/{self.index}", topic, value)
            answer = self._receive(f"{key}/all", 0, topic, deadline + _GRACE_S)
            return list(self._unpack_message(topic, 0, answer))
        values = [value]
        try:
            for other in range(1, self.count):
                message = self._receive(f"{key}/{other}", other, topic, deadline)
                values.append(self._unpack_message(topic, other, message))
        except ProcessError as error:
            self._send(f"{key}/all", topic, error=error)
            raise
        self._send(f"{key}/all", topic, values)
        self._delete_old_messages(channel)
        return values

    def raise_if_any_failed(self, topic: str, error: BaseException | None, *, channel: str = "main") -> None:
        """Raise if any process passes an error; see `Group.raise_if_any_failed`."""
        errors = self.all_gather(topic, None if error is None else _format_error(error), channel=channel)
        if error is not None:
            raise error
        failed = [index for index, text in enumerate(errors) if text is not None]
        if failed:
            raise ProcessError(
                what=f"{topic}: process {failed[0]} of {self.count} failed: {errors[failed[0]]}",
                why="if one process fails, all of them stop there; all committed steps are as they were.",
                fix="see the output of that process.",
            )

    def request_stop(self, reason: str | None) -> None:
        """Send the leader the reason why this process was asked to stop; only the first is sent."""
        if reason is not None and not self._has_requested_stop:
            self._has_requested_stop = True
            self._store.key_value_set(f"{self._key_prefix}/stop/{self.index}", reason)

    def get_stop_request(self) -> str | None:
        """Return the reason why any process was asked to stop, with the index of that process."""
        return next((f"{text} (process {index})" for index, text in self._read_all("stop").items()), None)

    def close(self) -> None:
        """Send the others that this process sends no more messages, and stop the heartbeat."""
        if not self._closed.is_set():
            self._closed.set()
            self._heartbeat_thread.join(2 * _POLL_S)
            try:
                self._store.key_value_set(f"{self._key_prefix}/left/{self.index}", "")
            except jax.errors.JaxRuntimeError:
                return  # The store is gone, and with it every other process.

    def _make_next_key(self, channel: str) -> str:
        self._message_counts[channel] = self._message_counts.get(channel, 0) + 1
        return f"{self._key_prefix}/{channel}/{self._message_counts[channel]}"

    def _delete_old_messages(self, channel: str) -> None:
        """Delete the messages before an all_gather: every process that takes part in it has read them."""
        count = self._message_counts[channel]
        for old in range(self._deleted_counts.get(channel, 0) + 1, count):
            self._store.key_value_delete(f"{self._key_prefix}/{channel}/{old}/")
        self._deleted_counts[channel] = count - 1

    def _send(self, key: str, topic: str, value: Any = None, *, error: BaseException | None = None) -> None:
        content = {"value": value} if error is None else {"error": _format_error(error)}
        try:
            self._store.key_value_set(key, json.dumps({"topic": topic, **content}))
        except jax.errors.JaxRuntimeError as failure:
            raise self._make_lost_service_error(topic, failure) from failure

    def _receive(self, key: str, sender: int, topic: str, deadline: float) -> dict[str, Any]:
        """Wait for a message of another process."""
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
                    fix="see the output of that process, and start the run again; "
                    "Storage(timeout_s=...) sets how long to wait for a slow one.",
                )
                error.missing = True
                raise error

    def _describe_absence(self, sender: int) -> str:
        """Return why a process will send nothing more; "" while it is alive."""
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
                what=f"{topic}: process {sender} of {self.count} failed: {message['error']}",
                why="if one process fails, all of them stop there; all committed steps are as they were.",
                fix="see the output of that process.",
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
            fix="see the output of process 0, and start the run again.",
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
    """Return an error as one line for another process."""
    return f"{type(error).__name__}: {getattr(error, 'what', error)}"


def get_process_index_and_count() -> tuple[int, int]:
    """Return the index of this process and the number of processes, without initialising a device for one process."""
    return (jax.process_index(), jax.process_count()) if jax.distributed.is_initialized() else (0, 1)


def make_group(timeout_s: float) -> Group:
    """Return the processes of `jax.distributed`; a single one without it."""
    index, count = get_process_index_and_count()
    return Group() if count == 1 else MultiprocessGroup(index, count, timeout_s)
