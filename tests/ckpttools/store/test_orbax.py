# SPDX-License-Identifier: Apache-2.0
"""A committed step is an ordinary Orbax checkpoint: v0 and v1 read it without us."""

import shutil
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as v0
import pytest
from orbax.checkpoint import v1

import ckpttools as ct
from ckpttools.store import orbax
from ckpttools.tree.records import Record

PARAMS = {"layers": {"0": jnp.arange(6.0).reshape(2, 3)}, "half": jnp.ones(4, jnp.bfloat16), "key": jax.random.key(5)}
OTHER = {"count": jnp.int32(7)}
SHARDING = jax.sharding.SingleDeviceSharding(jax.devices()[0])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    spec = ct.CheckpointSpec(directory=folder, keep=ct.All())
    state = {"model": {**PARAMS, "nothing": jnp.zeros((0, 2))}, "optimizer": OTHER, "data": {"epoch": 3}}
    with ct.open(spec) as ckpt:
        ckpt.save(3, state, metrics={"loss": 0.5})
        ckpt.save(7, state)
    return folder


def template(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=SHARDING), tree)


def assert_equal(restored, expected):
    for got, want in zip(jax.tree.leaves(restored), jax.tree.leaves(expected), strict=True):
        assert got.dtype == want.dtype
        if jnp.issubdtype(want.dtype, jax.dtypes.prng_key):
            got, want = jax.random.key_data(got), jax.random.key_data(want)
        np.testing.assert_array_equal(got, want)


def test_the_v1_functions_load_a_step(run):
    restored = v1.load_checkpointables(run / "7", {"model": template(PARAMS), "optimizer": template(OTHER)})
    assert_equal(restored, {"model": PARAMS, "optimizer": OTHER})
    assert_equal(v1.load(run / "3", template(PARAMS), checkpointable_name="model"), PARAMS)


def test_the_v0_manager_lists_and_loads_the_steps(run):
    with v0.CheckpointManager(run) as manager, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert sorted(manager.all_steps()) == [3, 7]
        args = v0.args.Composite(
            model=v0.args.StandardRestore(template(PARAMS)), optimizer=v0.args.StandardRestore(template(OTHER))
        )
        restored = manager.restore(7, args=args)
    assert_equal(dict(restored), {"model": PARAMS, "optimizer": OTHER})


def test_the_v0_checkpointer_loads_an_item_without_a_manager(run):
    with v0.StandardCheckpointer() as checkpointer:
        assert_equal(checkpointer.restore(run / "3" / "optimizer", template(OTHER)), OTHER)


@pytest.mark.parametrize(
    ("error", "place", "seen"),
    [
        pytest.param(RuntimeError("Event loop is closed"), __file__, 0, id="its loop is gone"),
        pytest.param(OSError("while reading"), v1.__file__, 0, id="Orbax takes its end for a failed read"),
        pytest.param(ValueError("another"), __file__, 1, id="another's"),
    ],
)
def test_leftovers_of_a_failed_load_do_not_complain_later(run, monkeypatch, error, place, seen):
    events = []
    monkeypatch.setattr(sys, "unraisablehook", lambda event: events.append(event.exc_type))

    class Suspended:
        def __await__(self):
            yield

    async def stays_open():
        try:
            await Suspended()
        finally:
            raise error

    stays_open.__code__ = stays_open.__code__.replace(co_filename=place)

    def failing(folder, items):
        cycle = [stays_open()]
        cycle.append(cycle)  # so that only the garbage collector finds it
        cycle[0].send(None)
        raise OSError("half way")

    monkeypatch.setattr(orbax.ocp, "load_checkpointables", failing)
    with pytest.raises(orbax.ReadError, match="half way"):
        orbax.read_foreign(run / "3")
    assert len(events) == seen


def test_a_damaged_step_is_not_read_by_orbax_again(run, tmp_path, monkeypatch):
    """Another look fails as well, and leaves behind what complains at any later moment."""
    step = shutil.copytree(run / "3", tmp_path / "3")
    looked = []
    monkeypatch.setattr(orbax, "_read_metadata", lambda folder: looked.append(folder) or {})

    def failing(folder, items):
        raise OSError("half way")

    monkeypatch.setattr(orbax.ocp, "load_checkpointables", failing)
    records = {"model": (Record(path=("half",), kind="array", shape=(4,), dtype="bfloat16"),)}
    with pytest.raises(orbax.ReadError, match="half way"):
        orbax.read(step, records)
    assert not looked
    (step / "model" / "_METADATA").write_text('{"key": "0", "key_type": 1}')  # control: a list
    with pytest.raises(orbax.ReadError):
        orbax.read(step, records)
    assert looked
