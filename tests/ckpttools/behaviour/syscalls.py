# SPDX-License-Identifier: Apache-2.0
"""One system call of a background save fails: every kind of call, at every position, by strace.

A server saves in the background; for each trial strace is attached to it and makes the n-th call of one kind fail in
each thread, TensorStore's included. The server reports the outcome of its next call; the parent checks the disk.
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
"""Kinds of calls, their errors, and which of them fails; not `write`, since pipes are written, too."""


def state_at(step: int) -> dict:
    return {"model": {"w": jnp.arange(200_000.0) + step, "b": jnp.ones(3) * step}, "data": {"n": step}}


def spec_for(directory: pathlib.Path) -> ct.CheckpointSpec:
    return ct.CheckpointSpec(directory=directory, save=ct.EverySteps(100), keep=ct.Latest(2))


def write_run(directory: pathlib.Path) -> None:
    with ct.open(spec_for(directory)) as ckpt:
        for step in range(1, BEFORE + 1):
            ckpt.save(step, state_at(step))


def serve() -> None:
    """For each directory on stdin: restore, wait for a line, save in the background, and report the next call."""
    for line in sys.stdin:
        with contextlib.suppress(ct.CheckpointError), ct.open(spec_for(pathlib.Path(line.strip()))) as ckpt:
            ckpt.restore(state_at(0))
            _send({})
            sys.stdin.readline()
            _send(_save_in_background(ckpt))
            sys.stdin.readline()
        _send({})


def _save_in_background(ckpt: ct.Session) -> dict:
    try:
        ckpt.save(TRIED, state_at(TRIED))
    except Exception as error:
        return {"at_once": _describe(error)}
    deadline = time.monotonic() + 15
    while ckpt._saver.worker is not None and not ckpt._saver.has_ended:
        if time.monotonic() > deadline:
            return {"hangs": True}
        time.sleep(0.002)
    failure = ckpt.failure
    found = {"background": None if failure is None else _describe(failure)}
    try:
        finished = ckpt.step(TRIED + 1, state_at(TRIED + 1)).finished
    except Exception as error:
        return {**found, "next": _describe(error)}
    return {**found, "finished": finished.step if finished else None}


def _describe(error: BaseException) -> dict:
    return {"text": f"{type(error).__name__}: {error}", "ours": isinstance(error, ct.CheckpointError)}


def _send(message: dict) -> None:
    print(json.dumps(message), flush=True)


@dataclasses.dataclass(frozen=True)
class Trial:
    """One call that failed.

    Attributes:
        name: Which.
        outcome: "failed", "saved", or "not met" if there was no such call.
        problems: What is wrong.
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

    def ask(self, line: str) -> dict:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{line}\n")
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
    """Whether strace is installed and may attach."""
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
                answer = server.ask("go")
            problems = list(_find_wrong_answers(answer))
            if answer.get("hangs"):
                server.end()
                server = Server()
            else:
                server.ask("close")
            problems += _find_wrong_files(work, answer)
            met = "INJECTED" in log.read_text()
            outcome = "not met" if not met else "saved" if answer.get("finished") == TRIED else "failed"
            yield Trial(f"{call} {error} {number}", outcome, tuple(problems))
    finally:
        server.end()


def _find_wrong_answers(answer: dict) -> Iterator[str]:
    if answer.get("hangs"):
        yield "the save never ends"
        return
    if answer.get("background") and answer.get("next") != answer["background"]:
        yield f"the next call did not raise the error of the background save: {answer}"
    if not answer.get("background") and not answer.get("at_once") and answer.get("finished") != TRIED:
        yield f"neither saved nor failed: {answer}"
    for error in filter(None, (answer.get("at_once"), answer.get("next"))):
        if not error["ours"]:
            yield f"not an error of ckpttools: {error['text']}"


def _find_wrong_files(work: pathlib.Path, answer: dict) -> list[str]:
    problems = []
    try:
        with ct.open(spec_for(work)) as ckpt:
            report = ckpt.restore(state_at(0))
            if report.rejected or report.step not in (BEFORE, TRIED):
                problems.append(f"restored {report}")
            if answer.get("finished") == TRIED != report.step:
                problems.append("a step that was reported as saved is missing")
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
