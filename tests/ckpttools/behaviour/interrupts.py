# SPDX-License-Identifier: Apache-2.0
"""A session whose calls are interrupted by exceptions at random moments, and a checker of the run that is left.

    python -m tests.ckpttools.behaviour.interrupts TRIALS SEED [--control]

Half of the interrupts are raised at a random trace event of the calling thread: at any bytecode of this package and of
`threading`, at any function call elsewhere. The other half are raised by a real signal after a random time. After an
interrupt the program goes on as a careless one would: it changes its arrays in place at once, and makes the next call.
Each state is its own witness: after n updates every element is n. With `--control` the session waits with
`Thread.join`, which on Python 3.12 takes an interrupted thread for ended.
"""

import argparse
import collections
import contextlib
import dataclasses
import faulthandler
import functools
import json
import pathlib
import random
import shutil
import signal
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

import ckpttools as ct
from ckpttools.save import worker
from ckpttools.session import saver
from ckpttools.store import digest, manifest, orbax

SIZE = 200_000
STEPS = 6
TIMEOUT_S = 60
_PACKAGE = str(pathlib.Path(ct.__file__).parent)


class Interrupt(BaseException):
    """What a signal handler raises; not an Exception, like KeyboardInterrupt."""


class Injector:
    """Raises `Interrupt` once, at a trace event or after a time.

    Args:
        at_event: The number of the event; None for none.
        after_s: The time in seconds; None for none.
    """

    def __init__(self, at_event: int | None = None, after_s: float | None = None) -> None:
        self.event_count = 0
        self.place = ""
        self._at_event = at_event
        self._after_s = after_s

    @property
    def was_raised(self) -> bool:
        return bool(self.place)

    @contextlib.contextmanager
    def armed(self) -> Iterator[None]:
        """Count events, and raise, in the body only."""
        if self.was_raised:
            yield
            return
        if self._after_s is not None:
            before = signal.signal(signal.SIGALRM, self._handle)
            signal.setitimer(signal.ITIMER_REAL, self._after_s)
        else:
            sys.settrace(self._trace)
        try:
            yield
        finally:
            sys.settrace(None)
            if self._after_s is not None:
                signal.setitimer(signal.ITIMER_REAL, 0)
                signal.signal(signal.SIGALRM, before)

    def _handle(self, _number: int, frame: FrameType | None) -> None:
        self._raise(frame)

    def _trace(self, frame: FrameType, _event: str, _argument: Any) -> Any:
        if frame.f_code.co_name == "__del__":
            return None  # Python ignores what a finalizer raises.
        self.event_count += 1
        if self.event_count == self._at_event:
            self._raise(frame)
        name = frame.f_code.co_filename
        if not (name.startswith(_PACKAGE) or name == threading.__file__):
            return None
        frame.f_trace_opcodes = True
        return self._trace

    def _raise(self, frame: FrameType | None) -> None:
        if not self.was_raised:
            code = frame.f_code if frame is not None else None
            line = frame.f_lineno if frame is not None else 0
            self.place = f"{pathlib.Path(code.co_filename).name}:{line} {code.co_qualname}" if code else "?"
            raise Interrupt


class JoinWorker(worker.Worker):
    """The control: a worker that is a `threading.Thread`, waited for with `join`."""

    def start(self) -> None:
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        self._has_started = True

    @property
    def has_ended(self) -> bool:
        return not self._thread.is_alive()

    def may_commit(self) -> bool:
        return True

    def wait(self, timeout_s: float) -> None:
        self._thread.join(timeout_s)


class Model(nnx.Module):
    def __init__(self) -> None:
        self.kernel, self.bias = nnx.Param(jnp.zeros(1000)), nnx.Param(jnp.zeros(10))


@dataclasses.dataclass
class Program:
    """A training program: a model that is updated in place, and arrays on the host that are, too."""

    injector: Injector
    rng: random.Random
    state: dict[str, Any] = dataclasses.field(
        default_factory=lambda: {"model": Model(), "host": [np.zeros(SIZE, np.float32) for _ in range(3)]}
    )
    reported: list[int] = dataclasses.field(default_factory=list)
    errors: list[str] = dataclasses.field(default_factory=list)

    def call(self, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """Make a call that may be interrupted; return None then."""
        try:
            with self.injector.armed():
                result = function(*args, **options)
        except Interrupt:
            return None
        except ValueError as error:
            # JAX's caches report whatever is raised while they compare keys as a ValueError with its traceback.
            if not (self.injector.was_raised and Interrupt.__qualname__ in str(error)):
                raise
            return None
        except ct.CheckpointError as error:
            self.errors.append(f"{type(error).__name__}: {error.what}")
            return None
        saved = result if isinstance(result, ct.Saved) else getattr(result, "finished", None)
        while saved is not None:
            self.reported.append(saved.step)
            saved = saved.finished
        return result

    def update(self) -> None:
        for variable in (self.state["model"].kernel, self.state["model"].bias):
            variable[...] = variable[...] + 1
        for array in self.state["host"]:
            array += 1

    def restore(self, ckpt: ct.Session, step: Any = "latest") -> int:
        """Restore, again if that was interrupted; return the step."""
        for _ in range(2):
            report = self.call(ckpt.restore, self.state, step)
            if report is not None:
                self.state = dict(report.state)
                return report.step or 0
        raise AssertionError(f"a restore after an interrupt failed: {self.errors}")

    def run(self, directory: pathlib.Path) -> None:
        storage = ct.Storage(asynchronous=self.rng.random() < 0.6, min_free="1x", timeout_s=TIMEOUT_S / 2)
        ckpt = ct.open(ct.CheckpointSpec(directory=directory, save=ct.EverySteps(1), keep=ct.All(), storage=storage))
        step = self.restore(ckpt)
        for _ in range(STEPS):
            self.update()
            step += 1
            self.call(ckpt.step, step, self.state)
            if self.rng.random() < 0.3:
                self.call(ckpt.wait)
            if self.rng.random() < 0.15 and ckpt.all_steps():
                target = self.rng.choice(ckpt.all_steps())
                before, report = step, self.call(ckpt.restore, self.state, target)
                if report is not None:
                    self.state, step = dict(report.state), report.step
                elif _get_values(self.state) != {float(before)}:
                    # A careless program goes on, with a state that may be half of each; it must be refused.
                    refused = ckpt.step(before + 1, self.state, on_error="return")
                    assert isinstance(refused, ct.Failed), refused
                    assert isinstance(refused.error, ct.NotRestoredError), refused
                    step = self.restore(ckpt, target)
        self.call(ckpt.close)


def _get_values(state: dict[str, Any]) -> set[float]:
    arrays = [state["model"].kernel[...], state["model"].bias[...], *state["host"]]
    return {float(value) for array in arrays for value in np.unique(np.asarray(array))}


def check(directory: pathlib.Path, program: Program) -> None:
    """Assert that the run is whole, and that a new session of the same process can continue it."""
    with ct.open(ct.CheckpointSpec(directory=directory, keep=ct.All())) as ckpt:
        state = {"model": Model(), "host": [np.zeros(SIZE, np.float32) for _ in range(3)]}
        report = ckpt.restore(state)
        if report.step is not None:
            assert not report.damaged, str(report)
            assert _get_values(dict(report.state)) == {float(report.step)}, f"step {report.step} holds other values"
        live_steps = ckpt.all_steps()
        assert isinstance(ckpt.save((report.step or 0) + 1, report.state), ct.Started)
    listed = collections.Counter(each.step for each in ct.ls(directory))
    reported = collections.Counter(program.reported)
    assert reported <= listed, f"reported {reported}, on the disk {listed}"
    verified = ct.verify(directory)
    assert verified.ok, str(verified)
    for step in live_steps:
        items = manifest.read(directory / str(step)).contents.items
        for record in (record for item in items.values() for record in item.records if record.is_in_orbax):
            assert record.digest == _hash_full(record.shape, step), f"step {step} holds other values in {record.path}"
    assert not [*(directory / ".ckpttools" / "staging").iterdir()], "a staging directory is left"


@functools.cache
def _hash_full(shape: tuple[int, ...], value: int) -> str:
    return digest.hash_array("xxh3", np.full(shape, value, np.float32))


def run_trial(seed: int, event_count: int) -> tuple[str, str]:
    """Make one run with one interrupt, and check it; return where it was raised, and the failure or ""."""
    rng = random.Random(seed)
    injector = Injector(at_event=rng.randint(1, event_count)) if seed % 2 else Injector(after_s=rng.uniform(0, 0.3))
    directory = pathlib.Path(tempfile.mkdtemp(prefix="interrupts-"))
    program = Program(injector, rng)
    faulthandler.dump_traceback_later(TIMEOUT_S, exit=True)
    try:
        program.run(directory)
        check(directory, program)
        return injector.place, ""
    except Exception as error:
        return (
            injector.place,
            f"seed {seed}: {type(error).__name__}: {str(error)[:500]} (interrupted at {injector.place})",
        )
    finally:
        faulthandler.cancel_dump_traceback_later()
        shutil.rmtree(directory, ignore_errors=True)


def count_events(seed: int) -> int:
    """Return how many trace events a run without an interrupt has."""
    injector = Injector(at_event=-1)
    directory = pathlib.Path(tempfile.mkdtemp(prefix="interrupts-"))
    Program(injector, random.Random(seed)).run(directory)
    shutil.rmtree(directory)
    return injector.event_count


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("trials", type=int)
    parser.add_argument("seed", type=int)
    parser.add_argument("--control", action="store_true")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    if options.control:
        saver.Worker = JoinWorker
    real = orbax.write

    def write_slowly(*args: Any, **keywords: Any) -> None:
        real(*args, **keywords)
        threading.Event().wait(0.02)

    orbax.write = write_slowly
    event_count = max(count_events(seed) for seed in range(3))
    failures, places = [], collections.Counter()
    for number in range(options.trials):
        place, failure = run_trial(options.seed * 1_000_000 + number, event_count)
        places[place.split(":")[0]] += 1
        if failure:
            failures.append(failure)
        if number % 100 == 99:
            print(f"{number + 1} trials, {len(failures)} failures", file=sys.stderr, flush=True)
    raised = options.trials - places.pop("", 0)
    print(json.dumps({"trials": options.trials, "raised": raised, "failures": failures, "places": dict(places)}))


if __name__ == "__main__":
    main()
