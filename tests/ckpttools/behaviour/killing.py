# SPDX-License-Identifier: Apache-2.0
"""A run that is killed again and again: a server forks children that train, and kills them at random moments.

The server imports everything and starts no JAX backend, so that a fork is safe and a child trains after a tenth of a
second. A child reports through a pipe which steps are durable; each of them must be there after the kill.
"""

import contextlib
import dataclasses
import os
import pathlib
import random
import select
import signal
import time
from collections.abc import Iterator

import fsspec.implementations.local  # noqa: F401  imported here, since a child would spend its short life on it
import jax.numpy as jnp
import numpy as np

import ckpttools as ct
from ckpttools.mirror.remote_store import RemoteStore
from ckpttools.store import catalogue

TOTAL = 45
KEEP = ct.Latest(2) | ct.EveryNSteps(15)


def spec_for(directory: pathlib.Path, *, mirrored: bool = False) -> ct.CheckpointSpec:
    mirror = ct.Mirror(f"file://{mirror_of(directory)}") if mirrored else None
    return ct.CheckpointSpec(directory=directory, save=ct.EverySteps(3), keep=KEEP, mirror=mirror)


def mirror_of(directory: pathlib.Path) -> pathlib.Path:
    return directory.with_name(f"{directory.name}-mirror")


class Noise:
    """A data iterator, so that resuming from the wrong position changes the result."""

    def __init__(self) -> None:
        self._rng = np.random.default_rng(5)

    def __next__(self) -> np.ndarray:
        return self._rng.standard_normal(512, np.float32)

    def get_state(self) -> dict:
        return self._rng.bit_generator.state

    def set_state(self, state: dict) -> None:
        self._rng.bit_generator.state = state


def train(directory: pathlib.Path, pipe: int | None = None, *, mirrored: bool = False) -> bytes:
    """Train to the end; return the bits of the final state. The mirror is slower than the saves."""
    if mirrored:
        _slow_down_the_mirror()
    state = {"model": {"w": jnp.zeros(512), "step": 0}, "data": Noise()}
    with ct.open(spec_for(directory, mirrored=mirrored)) as ckpt:
        report = ckpt.restore(state)
        model = report.state["model"]
        _report(pipe, report.step or 0)
        for step in ckpt.steps(TOTAL):
            model = {"w": model["w"] * 0.999 + next(state["data"]), "step": step}
            outcome = ckpt.step(step, {"model": model, "data": state["data"]})
            durable = outcome if isinstance(outcome, ct.Saved) else getattr(outcome, "finished", None)
            if durable:
                _report(pipe, durable.step)
    return np.asarray(model["w"]).tobytes() + str(model["step"]).encode()


def _slow_down_the_mirror() -> None:
    send = RemoteStore._upload_file

    def slow(*args) -> None:
        send(*args)
        time.sleep(0.005)

    RemoteStore._upload_file = slow


def _report(pipe: int | None, step: int) -> None:
    if pipe is not None:
        os.write(pipe, f"{step}\n".encode())


@dataclasses.dataclass
class Tally:
    """What was seen in all trials."""

    kills: int = 0
    in_a_save: int = 0
    in_a_copy: int = 0
    finished_runs: int = 0
    problems: list[str] = dataclasses.field(default_factory=list)

    def has_hit(self, *, mirrored: bool) -> bool:
        """Whether a kill came in the middle of what is tested: a save, or a copy to the mirror."""
        return bool(self.in_a_copy if mirrored else self.in_a_save)

    def compare(self, root: pathlib.Path, expected: bytes, *, mirrored: bool) -> None:
        """Let a run finish; compare its final state with that of an unkilled run, and its mirror with its steps."""
        self.finished_runs += 1
        if _in_child(lambda: train(root, mirrored=mirrored)) != expected:
            self.problems.append(f"{root.name}: the final state differs from that of an uninterrupted run")
        if mirrored:
            # A run that was killed between its last commit and the deletions after it has one step more.
            kept_steps = {verdict.step.step for verdict in ct.prune(root, KEEP, dry_run=True) if verdict.keep}
            copied = _copies(root)
            if copied != kept_steps:
                self.problems.append(f"{root.name}: of the steps {kept_steps} the mirror has {copied}")


def kill_often(directory: pathlib.Path, *, kills: int, seed: int, mirrored: bool = False) -> Tally:
    """Kill children at random moments until `kills` have died; compare each run that finishes and start another.

    On a slow machine few kills come in the middle of a save or of a copy, so there are more until one has.
    """
    rng, tally = random.Random(seed), Tally()
    expected = _in_child(lambda: train(directory / "whole"))
    root = directory / "run0"
    while tally.kills < kills or (tally.kills < 5 * kills and not tally.has_hit(mirrored=mirrored)):
        killed, reported = _one_life(root, rng, mirrored=mirrored)
        if killed:
            tally.kills += 1
            tally.in_a_save += any((root / ".ckpttools" / "staging").glob("*"))
            tally.in_a_copy += any((root / ".ckpttools" / "outbox").glob("*"))
            tally.problems += _check(root, max(reported, default=0)) + _check_mirror(root)
        else:
            tally.compare(root, expected, mirrored=mirrored)
            root = directory / f"run{tally.finished_runs}"
    # The last run is left to finish, so that there is always one to compare.
    tally.compare(root, expected, mirrored=mirrored)
    return tally


def _check(root: pathlib.Path, durable: int) -> list[str]:
    """Check that no durable step is lost, and that every numbered directory is a whole step."""
    steps = catalogue.scan(root)
    problems = [f"step {entry.step} is {entry.state}" for entry in steps.entries if entry.state != "committed"]
    latest = max((entry.step for entry in steps.live_entries), default=0)
    if latest < durable:
        problems.append(f"step {durable} was durable, and {latest} is the latest")
    return problems


def _copies(root: pathlib.Path) -> set[int]:
    store = RemoteStore(f"file://{mirror_of(root)}", {})
    return {copy.manifest.summary.step for copy in store.list_copies()}


def _check_mirror(root: pathlib.Path) -> list[str]:
    """Check that every finished copy has every byte."""
    if not mirror_of(root).exists():
        return []
    store = RemoteStore(f"file://{mirror_of(root)}", {})
    damaged = {copy.name: files for copy in store.list_copies() if (files := store.find_damaged_files(copy))}
    return [f"the mirror's {name} lacks {', '.join(files)}" for name, files in damaged.items()]


def _one_life(root: pathlib.Path, rng: random.Random, *, mirrored: bool) -> tuple[bool, list[int]]:
    """Start a child, let it train for a random time, kill it; return whether it was killed, and its durable steps."""
    read, write = os.pipe()
    child = _fork(lambda: train(root, write, mirrored=mirrored))
    os.close(write)
    buffer = b""
    # The first report comes when training begins; before that there is nothing to interrupt.
    deadline = time.monotonic() + 60
    life_s: float | None = None
    while True:
        ready, _, _ = select.select([read], [], [], 0.001)
        chunk = os.read(read, 4096) if ready else None
        if chunk == b"":
            break
        if chunk:
            buffer += chunk
            if life_s is None:
                life_s = rng.uniform(0.0, 0.6)
                deadline = time.monotonic() + life_s
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            break
    while chunk := os.read(read, 4096):
        buffer += chunk
    os.close(read)
    reported = [int(word) for word in buffer.split(b"\n")[:-1]]
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status) != 0:
        raise RuntimeError(f"the child failed with status {os.WEXITSTATUS(status)}")
    return os.WIFSIGNALED(status), reported


def _fork(work) -> int:
    child = os.fork()
    if child == 0:
        status = 1
        with contextlib.suppress(BaseException):
            work()
            status = 0
        os._exit(status)
    return child


def _in_child(work) -> bytes:
    """Run `work` in a child, since a server with a JAX backend could no longer fork."""
    read, write = os.pipe()
    child = _fork(lambda: os.write(write, work()))
    os.close(write)
    data = b"".join(iter(lambda: os.read(read, 1 << 16), b""))
    os.close(read)
    os.waitpid(child, 0)
    if not data:
        raise RuntimeError("the child returned nothing")
    return data


def lines(tally: Tally) -> Iterator[str]:
    """Format the tally."""
    yield f"kills {tally.kills}, of which in the middle of a save {tally.in_a_save}"
    if tally.in_a_copy:
        yield f"in the middle of a copy to the mirror {tally.in_a_copy}"
    yield f"runs finished and compared {tally.finished_runs}"
    yield f"problems {len(tally.problems)}: {tally.problems[:3]}"


if __name__ == "__main__":
    import sys
    import tempfile

    with tempfile.TemporaryDirectory() as scratch:
        mirrored = "mirrored" in sys.argv[3:]
        done = kill_often(pathlib.Path(scratch), kills=int(sys.argv[1]), seed=int(sys.argv[2]), mirrored=mirrored)
    print("\n".join(lines(done)))
    sys.exit(bool(done.problems) or not done.has_hit(mirrored=mirrored))
