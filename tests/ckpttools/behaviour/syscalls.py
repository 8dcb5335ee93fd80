# SPDX-License-Identifier: Apache-2.0
"""A disk that refuses one system call of a background save: every kind of call, at every place, by strace.

A server saves in the background; for each trial strace is attached to it and lets the n-th call of one kind fail in
each thread, TensorStore's among them. The server tells what its very next call said; the parent looks at the disk.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np

import ckpttools as ct

ROOT = pathlib.Path(__file__).parents[3]
BEFORE, TRIED, AFTER = 3, 4, 6
PLAN = (
    ("fsync", "EIO", range(1, 25)),
    ("writev", "ENOSPC", range(1, 8)),
    ("rename", "EIO", range(1, 6)),
    ("mkdir", "ENOSPC", range(1, 14)),
    ("openat", "EIO", range(1, 90)),
    ("openat", "EMFILE", range(1, 90, 4)),
    ("getdents64", "EIO", range(1, 70)),
    ("newfstatat", "EIO", range(1, 200, 2)),
    ("fstat", "EIO", range(1, 28)),
    ("sendfile", "ENOSPC", range(1, 22)),
    ("pread64", "EIO", range(1, 6)),
    ("unlinkat", "EIO", range(1, 30)),
    ("unlink", "EIO", range(1, 4)),
    ("rmdir", "EIO", range(1, 4)),
    ("statfs", "EIO", range(1, 2)),
    ("flock", "ENOLCK", range(1, 2)),
    ("ftruncate", "ENOSPC", range(1, 2)),
)
"""Kinds of calls, their errors, and which of them fails; `write` is left out, since pipes are written, too."""


def state_at(step: int) -> dict:
    return {"model": {"w": jnp.arange(200_000.0) + step, "b": jnp.ones(3) * step}, "data": {"n": step}}


def spec_for(folder: pathlib.Path) -> ct.CheckpointSpec:
    return ct.CheckpointSpec(directory=folder, save=ct.EverySteps(100), keep=ct.Latest(2))


def write_run(folder: pathlib.Path) -> None:
    with ct.open(spec_for(folder)) as ckpt:
        for step in range(1, BEFORE + 1):
            ckpt.save(step, state_at(step))


def serve() -> None:
    """For each folder on stdin: restore, wait for a word, save in the background, and tell of the next call."""
    for line in sys.stdin:
        with contextlib.suppress(ct.CheckpointError), ct.open(spec_for(pathlib.Path(line.strip()))) as ckpt:
            ckpt.restore(state_at(0))
            _say({})
            sys.stdin.readline()
            _say(_saved_behind(ckpt))
            sys.stdin.readline()
        _say({})


def _saved_behind(ckpt: ct.Session) -> dict:
    try:
        ckpt.save(TRIED, state_at(TRIED))
    except Exception as error:
        return {"at_once": _told(error)}
    deadline = time.monotonic() + 15
    while any(thread.name.startswith("ckpttools-save") for thread in threading.enumerate()):
        if time.monotonic() > deadline:
            return {"hangs": True}
        time.sleep(0.002)
    behind = ckpt.failure
    found = {"behind": None if behind is None else _told(behind)}
    try:
        finished = ckpt.step(TRIED + 1, state_at(TRIED + 1)).finished
    except Exception as error:
        return {**found, "next": _told(error)}
    return {**found, "finished": finished.step if finished else None}


def _told(error: BaseException) -> dict:
    return {"text": f"{type(error).__name__}: {error}", "ours": isinstance(error, ct.CheckpointError)}


def _say(told: dict) -> None:
    print(json.dumps(told), flush=True)


@dataclasses.dataclass(frozen=True)
class Trial:
    """One call that failed.

    Attributes:
        name: Which.
        outcome: "failed", "saved", or "not met" if there was no such call.
        problems: What should not be.
    """

    name: str
    outcome: str
    problems: tuple[str, ...] = ()


class Server:
    """The process that saves."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", __name__],
            cwd=ROOT,
            env={**os.environ, "JAX_PLATFORMS": "cpu"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def ask(self, word: str) -> dict:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{word}\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()


@contextlib.contextmanager
def _injected(process: int, call: str, error: str, number: int, log: pathlib.Path) -> Iterator[None]:
    rules = ["-e", f"trace={call}", "-e", f"inject={call}:error={error}:when={number}"]
    tracer = subprocess.Popen(
        ["strace", "-f", "-qq", "-o", str(log), *rules, "-p", str(process)], stderr=subprocess.DEVNULL
    )
    try:
        while not _is_traced(process):
            if tracer.poll() is not None:
                raise PermissionError("strace may not trace")
            time.sleep(0.002)
        yield
    finally:
        tracer.send_signal(signal.SIGINT)
        tracer.wait()


def _is_traced(process: int) -> bool:
    for thread in pathlib.Path(f"/proc/{process}/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            if "TracerPid:\t0\n" in (thread / "status").read_text():
                return False
    return True


def can_trace() -> bool:
    """Whether strace is here and may attach."""
    if shutil.which("strace") is None:
        return False
    sleeper = subprocess.Popen(["sleep", "30"])
    try:
        with _injected(sleeper.pid, "mkdir", "EIO", 1, pathlib.Path(os.devnull)):
            return True
    except PermissionError:
        return False
    finally:
        sleeper.kill()
        sleeper.wait()


def trials(scratch: pathlib.Path, plan: Iterator[tuple[str, str, int]]) -> Iterator[Trial]:
    """One trial for each kind of call, error and number."""
    write_run(scratch / "base")
    server = Server()
    try:
        for call, error, number in plan:
            work, log = scratch / "work", scratch / "log"
            shutil.rmtree(work, ignore_errors=True)
            shutil.copytree(scratch / "base", work)
            server.ask(str(work))
            with _injected(server.process.pid, call, error, number, log):
                told = server.ask("go")
            problems = list(_wrong_words(told))
            if told.get("hangs"):
                server.end()
                server = Server()
            else:
                server.ask("close")
            problems += _wrong_on_disk(work, told)
            met = "INJECTED" in log.read_text()
            outcome = "not met" if not met else "saved" if told.get("finished") == TRIED else "failed"
            yield Trial(f"{call} {error} {number}", outcome, tuple(problems))
    finally:
        server.end()


def _wrong_words(told: dict) -> Iterator[str]:
    if told.get("hangs"):
        yield "the save never ends"
        return
    if told.get("behind") and told.get("next") != told["behind"]:
        yield f"the next call did not raise the error of the background: {told}"
    if not told.get("behind") and not told.get("at_once") and told.get("finished") != TRIED:
        yield f"neither saved nor failed: {told}"
    for error in filter(None, (told.get("at_once"), told.get("next"))):
        if not error["ours"]:
            yield f"not in words: {error['text']}"


def _wrong_on_disk(work: pathlib.Path, told: dict) -> list[str]:
    problems = []
    try:
        with ct.open(spec_for(work)) as ckpt:
            report = ckpt.restore(state_at(0))
            if report.rejected or report.step not in (BEFORE, TRIED):
                problems.append(f"restored {report}")
            if told.get("finished") == TRIED != report.step:
                problems.append("what was called saved is not there")
            if not np.array_equal(report.state["model"]["w"], state_at(report.step)["model"]["w"]):
                problems.append("other bits")
            ckpt.save(AFTER, state_at(AFTER))
        if not ct.verify(work).ok:
            problems.append(str(ct.verify(work)))
        left = [str(path) for part in ("staging", "trash") for path in (work / ".ckpttools" / part).glob("*")]
        problems += [f"left over: {left}"] if left else []
    except Exception as error:
        problems.append(f"afterwards {type(error).__name__}: {error}")
    return problems


if __name__ == "__main__":
    serve()
