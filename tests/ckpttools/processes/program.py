# SPDX-License-Identifier: Apache-2.0
"""What each process of a test run does: scenarios one after the other, whose results are written as JSON.

`python program.py INDEX COUNT PORT DIRECTORY SCENARIO...`; the processes are real, joined by jax.distributed over gloo.
"""

import json
import os
import pathlib
import signal
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import ckpttools as ct
from ckpttools.processes import messages
from ckpttools.save import multiprocess_save
from ckpttools.store import orbax

W = np.arange(64, dtype=np.float32).reshape(8, 8)
ME, COUNT = map(int, sys.argv[1:3]) if __name__ == "__main__" else (0, 1)


class Data:
    """An iterator of one process."""

    def __init__(self, at: int = 0) -> None:
        self.at = at

    def get_state(self) -> dict:
        return {"at": self.at, "buffer": np.full(3, self.at, np.int16)}

    def set_state(self, state: dict) -> None:
        assert state["buffer"].tolist() == [state["at"]] * 3
        self.at = state["at"]


def spec(directory: pathlib.Path, name: str, **fields: object) -> ct.CheckpointSpec:
    storage = fields.pop("storage", ct.Storage(timeout_s=30, min_free=0))
    return ct.CheckpointSpec(directory=directory / name, storage=storage, **{"keep": ct.All(), **fields})


def shard(values: np.ndarray, shape: tuple[int, ...], names: tuple[str, ...], *axes: str | None) -> jax.Array:
    sharding = NamedSharding(Mesh(np.array(jax.devices()).reshape(shape), names), P(*axes))
    return jax.make_array_from_callback(values.shape, sharding, lambda index: values[index])


def model(factor: int = 1, *, resharded: bool = False) -> dict:
    """Sharded, replicated, of one process, and a key; `resharded` on another mesh."""
    shape = (2, jax.device_count() // 2)
    mesh = Mesh(np.array(jax.devices()), ("x",))
    keys = jax.jit(lambda: jax.random.split(jax.random.key(7), 8), out_shardings=NamedSharding(mesh, P("x")))()
    return {
        "w": shard(W * factor, shape, ("a", "b"), *((None, "a") if resharded else ("a", "b"))),
        "b": shard(W[1] * factor, shape, ("a", "b"), *(("b",) if resharded else ())),
        "half": shard((W * factor).astype(jnp.bfloat16), shape, ("a", "b"), "b"),
        "keys": keys,
        "local": np.arange(5) * factor,
        "count": jnp.int32(3),
        "name": "run",
    }


def whole(value: jax.Array) -> np.ndarray:
    data = jax.random.key_data(value) if jnp.issubdtype(value.dtype, jax.dtypes.prng_key) else value
    return np.asarray(jax.jit(lambda x: x, out_shardings=NamedSharding(data.sharding.mesh, P()))(data))


def same(first: dict, second: dict) -> bool:
    names = ("w", "b", "half", "keys")
    equal = all(whole(first[name]).tobytes() == whole(second[name]).tobytes() for name in names)
    return equal and np.array_equal(first["local"], second["local"]) and int(first["count"]) == int(second["count"])


def failure(call) -> str:
    began = time.monotonic()
    try:
        call()
    except ct.CheckpointError as error:
        text = f"{type(error).__name__}: {error.what}"
    else:
        text = "none"
    return f"{text} [{time.monotonic() - began:.1f} s]"


def save_and_restore(directory: pathlib.Path) -> dict:
    run = spec(directory, "run", save=ct.EverySteps(2), keep=ct.Latest(2))
    outcomes = []
    with ct.open(run) as ckpt:
        ckpt.restore({"model": model(), "data": Data()})
        for step in ckpt.steps(7):
            outcomes.append(type(ckpt.step(step, {"model": model(step), "data": Data(10 * ME + step)})).__name__)
        steps = ckpt.all_steps()
        data = Data()
        report = ckpt.restore({"model": model(0, resharded=True), "data": data})
        resharded = report.state["model"]["w"].sharding.spec == P(None, "a")
        older = ckpt.restore({"model": model(0)}, step=6).state["model"]
    return {
        "outcomes": outcomes,
        "steps": steps,
        "same": same(report.state["model"], model(7)),
        "older": same(older, model(6)),
        "resharded": resharded,
        "data": data.at,
    }


def go_back(directory: pathlib.Path) -> dict:
    """Back by one save and on to the same number; the program then starts again."""
    run = spec(directory, "back", keep=ct.Latest(1))
    with ct.open(run) as ckpt:
        ckpt.restore({"model": model()})
        for step in (2, 4):
            ckpt.save(step, {"model": model(step)})
        ckpt.restore({"model": model(0)}, step=2)
        ckpt.save(4, {"model": model(-4)})
        ckpt.wait()
        steps = ckpt.all_steps()
    with ct.open(run) as ckpt:
        again = same(ckpt.restore({"model": model(0)}).state["model"], model(-4))
        superseded = same(ckpt.restore({"model": model(0)}, step=ct.BranchStep(4, left(run))).state["model"], model(4))
        ckpt.save(6, {"model": model(6)})
        ckpt.wait()
        return {"steps": steps, "again": again, "superseded": superseded, "returned": ckpt.all_steps()}


def left(run: ct.CheckpointSpec) -> str:
    """The branch that was left."""
    (row,) = [row for row in ct.ls(run.directory) if row.state == "superseded"]
    return row.branch


def latency(directory: pathlib.Path) -> dict:
    """How long a step without a save takes."""
    state = {"count": 1}
    with ct.open(spec(directory, "latency", save=ct.EverySteps(10_000))) as ckpt:
        began = time.monotonic()
        for step in range(1, 1101):
            ckpt.step(step, state)
        return {"step_ms": (time.monotonic() - began) / 1.1}


def a_signal_to_one(directory: pathlib.Path) -> dict:
    with ct.open(spec(directory, "signal", save=ct.EverySteps(1000))) as ckpt:
        for step in ckpt.steps(50):
            if step == 3 and ME == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.005)
            last = ckpt.step(step, {"model": model(step)})
        return {"saved": last.step, "reason": last.reason, "steps": ckpt.all_steps(), "preempted": ckpt.preempted}


def metrics_that_differ(directory: pathlib.Path) -> dict:
    """The metrics of the leader decide."""
    result = []
    with ct.open(spec(directory, "metrics", save=ct.OnImprovement("loss", mode="min"))) as ckpt:
        for step, loss in enumerate((3.0, 2.0, 2.5, 1.0), start=1):
            outcome = ckpt.step(step, {"count": step}, metrics={"loss": loss if ME == 0 else -loss})
            result.append(isinstance(outcome, ct.Skipped))
        ckpt.wait()
        return {"skipped": result, "steps": ckpt.all_steps()}


class Broken(Data):
    def get_state(self) -> dict:
        return {"at": object()} if ME == 1 else super().get_state()


def one_cannot(directory: pathlib.Path) -> dict:
    """One process fails while it copies, then while it writes; the next save is good."""
    with ct.open(spec(directory, "fails")) as ckpt:
        ckpt.save(1, {"model": model(1)})
        ckpt.wait()
        copying = failure(lambda: ckpt.save(2, {"model": model(2), "data": Broken()}))
        write = orbax.write_shards
        if ME == 1:
            orbax.write_shards = refuse
        ckpt.save(3, {"model": model(3)})
        writing = failure(ckpt.wait)
        orbax.write_shards = write
        other = failure(lambda: ckpt.save(4, {"model": model(4) | ({"extra": 1} if ME else {})}) and ckpt.wait())
        after = ckpt.all_steps()
        ckpt.save(5, {"model": model(5)})
        ckpt.wait()
        return {"copying": copying, "writing": writing, "other": other, "after": after, "then": ckpt.all_steps()}


def refuse(*args: object, **kwargs: object) -> None:
    raise OSError(5, "Input/output error")


def without_barriers(directory: pathlib.Path) -> dict:
    """Control: a slow process is waited for, and is not without barriers."""
    write = orbax.write_shards

    def slowly(*args: object, **kwargs: object) -> None:
        time.sleep(1.0)
        write(*args, **kwargs)

    def skip_barrier(self: object, name: str, work) -> None:
        if ME == 0:
            work()

    result = {}
    barrier = multiprocess_save._MultiprocessSave.run_phase
    for name in ("with", "without"):
        with ct.open(spec(directory, name)) as ckpt:
            orbax.write_shards = slowly if ME else write
            multiprocess_save._MultiprocessSave.run_phase = skip_barrier if name == "without" else barrier
            ckpt.save(1, {"model": model(1)})
            result[name] = failure(ckpt.wait)
            result[f"{name} steps"] = ckpt.all_steps()
        multiprocess_save._MultiprocessSave.run_phase, orbax.write_shards = barrier, write
        time.sleep(1.5)
    return result


def misuse(directory: pathlib.Path) -> dict:
    """What several processes cannot do, or must do in the same way, is refused."""
    quick = ct.Storage(timeout_s=2, min_free=0)
    result = {
        "mirror": failure(lambda: ct.open(spec(directory, "m1", mirror=str(directory / "mirror")))),
        "validate": failure(lambda: ct.open(spec(directory, "m2"), validate=lambda state: 1)),
        "manager": failure(lambda: ct.CheckpointManager(directory / "m3")),
        "specs": failure(lambda: ct.open(spec(directory, "m4", save=ct.EverySteps(1 + ME)))),
        "directories": failure(lambda: ct.open(spec(directory / f"{ME}", "m5"))),
    }
    with ct.open(spec(directory, "m6", storage=quick)) as ckpt:
        if ME == 0:
            result["alone"] = failure(lambda: ckpt.save(1, {"model": {"count": 1}}))
        time.sleep(3 if ME else 0)
    return result


def damaged_for_one(directory: pathlib.Path) -> dict:
    """A step that one process cannot read is passed over by all."""
    run = spec(directory, "damaged")
    with ct.open(run) as ckpt:
        for step in (1, 2):
            ckpt.save(step, {"model": model(step)})
            ckpt.wait()
    read = orbax.read

    def spoiled(path: pathlib.Path, records):
        arrays = read(path, records)
        if path.name == "2" and ME == 1:
            arrays["model"]["w",][7, 7] += 1
        return arrays

    orbax.read = spoiled
    with ct.open(run) as ckpt:
        report = ckpt.restore({"model": model(0)})
    orbax.read = read
    return {"step": report.step, "same": same(report.state["model"], model(1))}


def restore_from_others(directory: pathlib.Path) -> dict:
    """Steps that another number of processes saved."""
    report = ct.load(directory / "run", {"model": model(0)}, step=7)
    result = {"same": same(report.state["model"], model(7))}
    result["data"] = failure(lambda: ct.load(directory / "run", {"data": Data()}, step=7))
    with ct.open(spec(directory, "run")) as ckpt:
        ckpt.restore({"model": model(0)})
        ckpt.save(8, {"model": model(8)})
        ckpt.wait()
        result["steps"] = ckpt.all_steps()
    if (directory / "single").exists():
        single = ct.load(directory / "single", {"params": {"w": model(0)["w"]}})
        result["single"] = whole(single.state["params"]["w"]).tobytes() == W.tobytes()
    return result


def one_dies(directory: pathlib.Path) -> dict:
    """Process 1 is killed while it writes; the last scenario of a run, since JAX does not continue after it."""
    messages._LOST_AFTER_S = 3.0
    with ct.open(spec(directory, "dies")) as ckpt:
        ckpt.save(1, {"model": model(1)})
        ckpt.wait()
        if ME == 1:
            orbax.write_shards = lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGKILL)
        ckpt.save(2, {"model": model(2)})
        result = {"error": failure(ckpt.wait), "steps": ckpt.all_steps()}
        result["staging"] = len(list((directory / "dies" / ".ckpttools" / "staging").iterdir()))
        return result


def killed(directory: pathlib.Path) -> dict:
    """Save all the time, until a process is killed."""
    messages._LOST_AFTER_S = 3.0
    step = 0

    def forever() -> None:
        nonlocal step
        with ct.open(spec(directory, "killed", save=ct.EverySteps(1), keep=ct.Latest(3))) as ckpt:
            ckpt.restore({"model": model()})
            for step in ckpt.steps(10_000):
                ckpt.step(step, {"model": model(step)})

    return {"error": failure(forever), "step": step}


class Loop:
    """A trainer whose state is partly sharded, partly replicated, and has an iterator that differs by process."""

    total_steps = 8

    def __init__(self, meanwhile=lambda step: None) -> None:
        self._meanwhile = meanwhile
        self._state = {"model": model(), "data": Data()}

    def get_state(self) -> dict:
        return self._state

    def set_state(self, state: dict) -> None:
        self._state = dict(state)

    def train_step(self) -> dict:
        data, values = self._state["data"], self._state["model"]
        data.at += 1
        self._meanwhile(data.at)
        grown = {name: _grow(values[name], data.at) for name in ("w", "b", "half")}
        self._state["model"] = {**values, **grown, "local": values["local"] + data.at, "count": values["count"] + 1}
        return {"loss": 1 / data.at + ME}


@jax.jit
def _grow(x: jax.Array, by: int) -> jax.Array:
    return (x * 0.9 + by).astype(x.dtype)


def trained(directory: pathlib.Path, name: str, meanwhile=lambda step: None) -> dict:
    loop = Loop(meanwhile)
    run = spec(directory, name, save=ct.EverySteps(3) & ct.OnImprovement("loss", mode="min"))
    report = ct.train(loop, run)
    result = {"from": report.restored.step, "to": report.last_step, "preempted": report.preempted}
    bits = {key: whole(loop.get_state()["model"][key]).tobytes().hex() for key in ("w", "b", "half")}
    state = [bits, loop.get_state()["model"]["local"].tolist(), loop.get_state()["data"].at]
    return result | {"state": state, "steps": [row.step for row in ct.ls(directory / name)]}


def train_whole(directory: pathlib.Path) -> dict:
    return trained(directory, "whole")


def train_and_go_on(directory: pathlib.Path) -> dict:
    """After `train_and_die`, and after `train_and_stop`."""
    return {"dead": trained(directory, "dead"), "stopped": trained(directory, "stopped")}


def train_and_stop(directory: pathlib.Path) -> dict:
    """SIGTERM to process 1 in the middle of update 5."""

    def meanwhile(step: int) -> None:
        if step == 5 and ME == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    return trained(directory, "stopped", meanwhile)


def train_and_die(directory: pathlib.Path) -> dict:
    """SIGKILL to process 1 in the middle of update 5, with step 3 on the disk; the last scenario of a run."""
    messages._LOST_AFTER_S = 3.0
    deadline = time.monotonic() + 20

    def meanwhile(step: int) -> None:
        if step == 5 and ME == 1:
            while not (directory / "dead" / "3").exists() and time.monotonic() < deadline:
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)

    return {"error": failure(lambda: trained(directory, "dead", meanwhile))}


def main() -> None:
    port, directory = sys.argv[3], pathlib.Path(sys.argv[4])
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", COUNT, ME)
    result = {}
    answer = directory / f"answer-{ME}.json"
    for name in sys.argv[5:]:
        try:
            result[name] = globals()[name](directory)
        except Exception as error:
            result[name] = {"raised": f"{type(error).__name__}: {error}"}
        answer.write_text(json.dumps(result))
    # No shutdown after these: JAX would wait for the dead process.
    if sys.argv[-1] not in ("one_dies", "killed", "train_and_die"):
        jax.distributed.shutdown()
    os._exit(0)


if __name__ == "__main__":
    main()
