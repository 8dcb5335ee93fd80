# SPDX-License-Identifier: Apache-2.0
"""Damage one file of a run of three steps, and restore it; for the tests and the benchmark."""

import dataclasses
import pathlib
import random
import shutil
from collections import Counter
from collections.abc import Iterator

import jax
import jax.numpy as jnp

import ckpttools as ct
from tests.ckpttools.behaviour.examples import leaves

KINDS = ("flip", "to 0", "half", "-1 byte", "deleted", "swapped")
OLDEST, GOOD, NEWER = 5, 10, 20


def state_at(step: int) -> dict:
    """Arrays of all sizes, so that Orbax stores some in data files and some in its B-trees."""
    base = jnp.arange(3000.0)
    return {
        "model": {"large": base * step, "small": jnp.arange(5.0) + step, "half": jnp.ones(600, jnp.bfloat16) * step},
        "optimizer": {"mu": base * 0.5 + step, "count": jnp.int32(step), "key": jax.random.key(step)},
        "data": {"epoch": step, "nothing": jnp.zeros((0, 2))},
    }


def spec_for(directory: pathlib.Path, *, compression: bool = False) -> ct.CheckpointSpec:
    return ct.CheckpointSpec(directory=directory, keep=ct.All(), storage=ct.Storage(compression=compression))


def write_run(directory: pathlib.Path, *, compression: bool = False) -> None:
    with ct.open(spec_for(directory, compression=compression)) as ckpt:
        for step in (OLDEST, GOOD, NEWER):
            ckpt.save(step, state_at(step), metrics={"loss": 1 / step})


def files_of(run: pathlib.Path) -> list[str]:
    """Every file of the newer step, by its path in it."""
    step = run / str(NEWER)
    return sorted(path.relative_to(step).as_posix() for path in step.rglob("*") if path.is_file())


def damage(run: pathlib.Path, name: str, kind: str, rng: random.Random) -> bool:
    """Damage one file of the newer step; return False if this kind of damage does not change the file."""
    path = run / str(NEWER) / name
    data = path.read_bytes()
    if kind == "deleted":
        path.unlink()
        return True
    if kind == "flip" and data:
        position = rng.randrange(8 * len(data))
        changed = bytearray(data)
        changed[position // 8] ^= 1 << (position % 8)
        new = bytes(changed)
    elif kind == "swapped":
        new = _twin(run, name).read_bytes()
    else:
        new = {"flip": data, "to 0": b"", "half": data[: len(data) // 2], "-1 byte": data[:-1]}[kind]
    path.write_bytes(new)
    return new != data


def flip_bit_of(step: pathlib.Path | str, content: bytes) -> None:
    """Flip one bit of an array, given by its bytes, in the file of a step that holds it."""
    for path in pathlib.Path(step).rglob("*"):
        data = path.read_bytes() if path.is_file() else b""
        if content in data:
            middle = data.index(content) + len(content) // 2
            path.write_bytes(data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :])
            return
    raise AssertionError(f"no file of {step} holds these bytes")


def _twin(run: pathlib.Path, name: str) -> pathlib.Path:
    """The file of the older step that corresponds to `name`; Orbax's data files have random names."""
    twin = run / str(GOOD) / name
    if twin.exists():
        return twin
    size = (run / str(NEWER) / name).stat().st_size
    return min(
        (path for path in twin.parent.iterdir() if path.is_file()), key=lambda path: abs(path.stat().st_size - size)
    )


@dataclasses.dataclass(frozen=True)
class Trial:
    """The outcome of one damage: "detected" (named, and the older step restored), "harmless" (the newer one restored
    bit for bit), or a failure: "silent", "crash", "unnamed"."""

    name: str
    kind: str
    outcome: str
    detail: str = ""


def try_damage(pristine: pathlib.Path, work: pathlib.Path, name: str, kind: str, rng: random.Random) -> Trial | None:
    """Make one trial in a new copy; None if the damage changes nothing."""
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(pristine, work)
    if not damage(work, name, kind, rng):
        return None
    try:
        with ct.open(spec_for(work)) as ckpt:
            report = ckpt.restore(state_at(0))
    except Exception as error:
        return Trial(name, kind, "crash", f"{type(error).__name__}: {error}")
    if report.step == NEWER:
        same = leaves(report.state) == leaves(state_at(NEWER))
        return Trial(name, kind, "harmless" if same else "silent")
    if report.step != GOOD or leaves(report.state) != leaves(state_at(GOOD)):
        return Trial(name, kind, "silent", f"restored {report.step}")
    (rejected,) = report.rejected
    named = rejected.leaves or rejected.files or "ckpttools.manifest" in rejected.reason or name in rejected.reason
    return Trial(name, kind, "detected" if named else "unnamed", rejected.reason)


def trials(pristine: pathlib.Path, work: pathlib.Path, *, count: int, seed: int) -> Iterator[Trial]:
    """Make `count` trials: every file with every kind of damage once, then random ones."""
    rng = random.Random(seed)
    names = files_of(pristine)
    planned = [(name, kind) for kind in KINDS for name in names]
    rng.shuffle(planned)
    done = 0
    while done < count:
        name, kind = planned.pop(0) if planned else (rng.choice(names), rng.choice(["flip", "flip", "flip", *KINDS]))
        trial = try_damage(pristine, work, name, kind, rng)
        if trial is not None:
            done += 1
            yield trial


def tally(found: list[Trial]) -> dict[tuple[str, str], Counter]:
    """Outcomes by class of file and kind of damage."""
    table: dict[tuple[str, str], Counter] = {}
    for trial in found:
        table.setdefault((file_class(trial.name), trial.kind), Counter())[trial.outcome] += 1
    return table


def file_class(name: str) -> str:
    """The kind of a file, across steps and items."""
    if "/d/" in name:
        return "OCDBT data and trees"
    last = name.rpartition("/")[2]
    return "array_metadatas" if "array_metadatas" in name else last
