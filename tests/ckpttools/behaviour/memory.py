# SPDX-License-Identifier: Apache-2.0
"""The peak of host memory in saving and restoring, in states; for the tests and the benchmark.

`python -m tests.ckpttools.behaviour.memory WAY MEGABYTES PARTS DIRECTORY`, one process for each way. glibc reuses freed
blocks below 32 MB instead of returning them, so the peak is that of the blocks in use at one time only under
`MALLOC_MMAP_THRESHOLD_=65536`.
"""

import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Callable

import jax
import numpy as np
from orbax.checkpoint import v1

import ckpttools as ct

GIVEN_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536"}
ROOT = pathlib.Path(__file__).parents[3]

type State = dict[str, jax.Array]

update = jax.jit(lambda state: jax.tree.map(lambda x: x * 0.999 + 0.001, state), donate_argnums=0)


def make_state(megabytes: int, parts: int) -> State:
    """Float32 normals, as weights are."""
    size = megabytes * 1_000_000 // 4 // parts
    state = {f"part{n}": jax.random.normal(jax.random.key(n), (size,)) for n in range(parts)}
    return jax.block_until_ready(state)


def template_of(state: State) -> dict[str, jax.ShapeDtypeStruct]:
    """The state without its values."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def spec_for(directory: pathlib.Path) -> ct.CheckpointSpec:
    return ct.CheckpointSpec(directory=directory, keep=ct.All())


def save_orbax(directory: pathlib.Path, state: State) -> None:
    context = v1.Context()
    context.array.saving.use_compression = False
    with context:
        v1.save_checkpointables(directory, {"model": state})


def _save(directory: pathlib.Path, state: State) -> None:
    with ct.open(spec_for(directory / "ours")) as ckpt:
        ckpt.save(1, {"model": state})


def _save_often(directory: pathlib.Path, state: State) -> None:
    """Each save begins while the previous one may still be written, and the update after it donates what is saved."""
    with ct.open(spec_for(directory / "ours")) as ckpt:
        for step in range(1, 5):
            state = update(state)
            ckpt.save(step, {"model": state})
        jax.block_until_ready(update(state))


def _restore(directory: pathlib.Path, template: State) -> None:
    with ct.open(spec_for(directory / "ours")) as ckpt:
        jax.block_until_ready(ckpt.restore({"model": template}).state)


WAYS: dict[str, Callable[[pathlib.Path, State], None]] = {
    "save: ckpttools": _save,
    "save: ckpttools, four in a row with donated updates": _save_often,
    "save: Orbax": lambda directory, state: save_orbax(directory / "plain", state),
    "restore: ckpttools": _restore,
    "restore: Orbax": lambda directory, template: jax.block_until_ready(
        v1.load_checkpointables(directory / "plain", {"model": template})
    ),
}


def peak(way: str, megabytes: int, parts: int, directory: pathlib.Path) -> float:
    """Return the peak of host memory in one operation beyond what the process has before it, in states."""
    state = make_state(megabytes, parts)
    total = sum(np.asarray(x).nbytes for x in jax.tree.leaves(state))
    given: State = state
    if way.startswith("restore"):
        if "ckpttools" in way:
            _save(directory, state)
        else:
            save_orbax(directory / "plain", state)
        given = template_of(state)
    else:
        given = jax.block_until_ready(update(state))
    del state
    # Reset the high-water mark, so that it is that of the operation alone.
    pathlib.Path("/proc/self/clear_refs").write_text("5")
    before = _status_bytes("VmRSS")
    WAYS[way](directory, given)
    return (_status_bytes("VmHWM") - before) / total


def _status_bytes(field: str) -> int:
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def peak_of(way: str, megabytes: int, parts: int, directory: str | None = None, **environment: str) -> float:
    """Return `peak`, measured in a separate process."""
    with tempfile.TemporaryDirectory(dir=directory) as scratch:
        command = [sys.executable, "-W", "ignore", "-m", __name__, way, str(megabytes), str(parts), scratch]
        done = subprocess.run(
            command, capture_output=True, text=True, check=True, cwd=ROOT, env={**os.environ, **environment}
        )
    return float(done.stdout.split()[-1])


if __name__ == "__main__":
    print(peak(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), pathlib.Path(sys.argv[4])))
