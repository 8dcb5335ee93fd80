# SPDX-License-Identifier: Apache-2.0
"""Twice as many leaves take twice as many operations; counted, since time depends on the machine."""

import collections
import hashlib
import sys

import numpy as np
import pytest
from flax import nnx

import ckpttools as ct
from ckpttools.tree import replacing

COUNTED = ("/ckpttools/", "/remattools/", "/flax/")


class Net(nnx.Module):
    def __init__(self, count, name="layers", seed=0):
        entries = (nnx.Param(np.full(2, seed + n, np.float32)) for n in range(count))
        setattr(self, name, nnx.List(list(entries)))
        self.raw = nnx.List([np.full(1, seed, np.float32) for _ in range(count // 4)])


def count_operations(function):
    """Return the calls and loop iterations of each function of this package and of flax."""
    counts = collections.Counter()
    monitoring, tool = sys.monitoring, sys.monitoring.PROFILER_ID

    def count(code, *_):
        if not any(part in code.co_filename for part in COUNTED) or "/tests/" in code.co_filename:
            return monitoring.DISABLE
        counts[f"{code.co_filename.rpartition('/')[2]}:{code.co_qualname}"] += 1
        return None

    events = monitoring.events.PY_START | monitoring.events.JUMP | monitoring.events.CALL
    monitoring.use_tool_id(tool, "linear")
    try:
        for event in (monitoring.events.PY_START, monitoring.events.JUMP, monitoring.events.CALL):
            monitoring.register_callback(tool, event, count)
        monitoring.restart_events()
        monitoring.set_events(tool, events)
        function()
    finally:
        monitoring.set_events(tool, 0)
        monitoring.free_tool_id(tool)
    return counts


def find_superlinear(run, small=120):
    run(20)()  # Imports and caches.
    few, many = count_operations(run(small)), count_operations(run(2 * small))
    assert few.total() > small, "nothing was counted"
    return {name: (few[name], count) for name, count in many.items() if count > 2.3 * few[name] + 3 * small}


@pytest.fixture
def make_run(tmp_path):
    made = {}

    def make(count):
        if count not in made:
            made[count] = tmp_path / str(count)
            spec = ct.CheckpointSpec(directory=made[count], storage=ct.Storage(asynchronous=False), keep=ct.All())
            with ct.open(spec) as ckpt:
                ckpt.save(1, {"model": Net(count)})
                ckpt.save(2, {"model": Net(count, seed=1)})
        return made[count]

    return make


def save(directory, state):
    with ct.open(ct.CheckpointSpec(directory=directory / "new", storage=ct.Storage(asynchronous=False))) as ckpt:
        ckpt.save(1, state)


def refuse(directory, state):
    with pytest.raises(ct.StructureError) as caught:
        ct.load(directory, state)
    assert str(caught.value)


def make_hashed_names(count):
    names = (
        hashlib.sha256(str(n).encode()).hexdigest().translate(str.maketrans("0123456789", "ghijklmnop"))
        for n in range(count)
    )
    return {"model": {name: np.zeros(2) for name in names}}


RUNS = {
    "restore in place": (lambda n: {"model": Net(n)}, lambda run, state: ct.load(run, state)),
    "restore of a state": (lambda n: {"model": nnx.split(Net(n))[1]}, lambda run, state: ct.load(run, state)),
    "preview": (lambda n: {"model": Net(n)}, lambda run, state: str(ct.preview(run, state))),
    "verify": (lambda n: None, lambda run, state: ct.verify(run)),
    "diff": (lambda n: None, lambda run, state: str(ct.diff(run, run, steps=(1, 2)))),
    "save": (lambda n: {"model": Net(n)}, save),
    "error for another name": (lambda n: {"model": Net(n, "blocks")}, refuse),
    "error for names without a pattern": (make_hashed_names, refuse),
}


@pytest.mark.parametrize("name", RUNS)
def test_operations_grow_with_the_leaves_and_no_faster(make_run, name):
    make_state, operate = RUNS[name]

    def run(count):
        directory, state = make_run(count), make_state(count)
        return lambda: operate(directory, state)

    assert find_superlinear(run) == {}


def test_an_update_of_the_whole_model_per_leaf_is_noticed(make_run, monkeypatch):
    def set_variable(self, name, variable, value):
        nnx.update(models[-1], {"layers": {int(name.rpartition(".")[2]): value}})

    models = []

    def run(count):
        directory, model = make_run(count), Net(count)
        models.append(model)
        return lambda: ct.load(directory, {"model": model}, only="model.layers")

    monkeypatch.setattr(replacing.Replacements, "set_variable", set_variable)
    assert any("graph" in name for name in find_superlinear(run))
