# SPDX-License-Identifier: Apache-2.0
"""What cannot be placed is refused with the leaf's name before anything changes."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

import ckpttools as ct
from ckpttools.tree import placing
from ckpttools.tree.records import Record
from tests.ckpttools.behaviour.examples import Batches, Net, leaves


def make_mesh(*names):
    return jax.make_mesh((8,) if len(names) == 1 else (2, 4), names, axis_types=(AxisType.Auto,) * len(names))


def abstract(shape=(7,), dtype=jnp.float32, mesh=None):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh or make_mesh("x"), P("x")))


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("placing")
    state = {
        "data": Batches(1),
        "model": Net(nnx.Rngs(0)),
        "table": {"seven": jnp.arange(7.0), "eight": jnp.arange(8.0), "wide": np.arange(8.0)},
        "keys": jax.random.split(jax.random.key(0), 7),
    }
    with ct.open(ct.CheckpointSpec(directory=directory, storage=ct.Storage(asynchronous=False))) as ckpt:
        ckpt.save(1, state)
    return directory


UNPLACEABLE = {
    "indivisible": ("table.seven", lambda: abstract(), "8 times, but the dimension size is 7"),
    "no current mesh": ("table.eight", lambda: abstract((8,), mesh=make_mesh("x").abstract_mesh), "no mesh is current"),
    "keys": ("keys", lambda: abstract(dtype=jax.random.key(0).dtype), "8 times, but the dimension size is 7"),
    "x64": ("table.wide", lambda: jax.ShapeDtypeStruct((8,), np.float64), "jax_enable_x64"),
}


@pytest.mark.parametrize("case", UNPLACEABLE)
def test_an_unplaceable_leaf_is_named_before_anything_changes(directory, case, monkeypatch):
    name, make, reason = UNPLACEABLE[case]
    state = {"data": Batches(2), "model": Net(nnx.Rngs(1))}
    item, _, leaf = name.partition(".")
    before = leaves(state)
    monkeypatch.setattr("ckpttools.store.orbax.read", lambda *_: pytest.fail("arrays were read first"))
    with pytest.raises(ct.PlacementError) as caught:
        ct.load(directory, {**state, item: {leaf: make()} if leaf else make()}, only=["data", "model", name])
    assert caught.value.leaves == (name,)
    assert f"{name}: " in caught.value.what
    assert reason in caught.value.what
    assert leaves(state) == before


def test_every_leaf_that_cannot_be_placed_is_listed(directory):
    template = {"table": {"seven": abstract(), "wide": jax.ShapeDtypeStruct((8,), np.float64)}}
    with pytest.raises(ct.PlacementError) as caught:
        ct.load(directory, template, only="table.{seven,wide}")
    assert caught.value.leaves == ("table.seven", "table.wide")


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_an_abstract_mesh_means_the_current_mesh(tmp_path, axis_type):
    def make(seed=0):
        init = nnx.with_partitioning(nnx.initializers.lecun_normal(), (None, "b"))
        return nnx.Linear(8, 8, rngs=nnx.Rngs(seed), kernel_init=init)

    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(axis_type,) * 2)
    other = jax.make_mesh((4, 2), ("a", "b"), axis_types=(axis_type,) * 2)
    with jax.set_mesh(mesh):
        model, template = make(), nnx.eval_shape(make)
        with ct.open(ct.CheckpointSpec(directory=tmp_path)) as ckpt:
            ckpt.save(1, {"model": model})
        wanted = np.asarray(model.kernel[...])
        live = make(1)
        ct.load(tmp_path, {"model": live})
        assert live.kernel.get_raw_value().sharding == model.kernel.get_raw_value().sharding
    for current in (mesh, other):
        with jax.set_mesh(current):
            filled = ct.load(tmp_path, {"model": nnx.clone(template)}).state["model"]
        kernel = filled.kernel.get_raw_value()
        assert kernel.sharding == NamedSharding(current, P(None, "b"))
        np.testing.assert_array_equal(np.asarray(kernel), wanted)
    with jax.set_mesh(make_mesh("x")), pytest.raises(ct.PlacementError, match=r"model\.kernel: .*b"):
        ct.load(tmp_path, {"model": nnx.clone(template)})


class Device:
    """A device of limited memory, as its allocator reports it."""

    def __init__(self, free, kinds=("device",)):
        self.free, self.kinds = free, kinds

    def memory_stats(self):
        return {"bytes_limit": 5000, "bytes_in_use": 5000 - self.free}

    def addressable_memories(self):
        return [types.SimpleNamespace(kind=kind) for kind in self.kinds]

    def __repr__(self):
        return "device 0"


def make_template(device, size, kind="device"):
    sharding = types.SimpleNamespace(
        addressable_devices=[device], memory_kind=kind, shard_shape=lambda shape: shape, is_fully_addressable=True
    )
    return types.SimpleNamespace(sharding=sharding), Record(path=("w",), kind="array", shape=(size,), dtype="float32")


def test_a_state_larger_than_the_device_memory_is_refused():
    device = Device(free=1000)
    half = [(name, *make_template(device, 125)) for name in ("a", "b")]
    placing.require_placeable(half)
    with pytest.raises(ct.PlacementError, match=r"device 0 has 0\.0 MiB free"):
        placing.require_placeable([*half, ("c", *make_template(device, 1))])
    # In the memory of the host there is room.
    host = Device(free=1000, kinds=("device", "pinned_host"))
    placing.require_placeable([("a", *make_template(host, 10_000, "pinned_host"))])


def test_what_is_replaced_makes_room(monkeypatch):
    array = jnp.zeros(200)
    device = Device(free=1000)
    real = placing._measure_shards
    monkeypatch.setattr(placing, "_measure_shards", lambda *given: ((device, size) for _, size in real(*given)))
    record = Record(path=("w",), kind="array", shape=(200,), dtype="float32")
    placing.require_placeable([(str(n), array, record) for n in range(5)])
    fresh = jax.ShapeDtypeStruct((200,), jnp.float32, sharding=SingleDeviceSharding(jax.devices()[0]))
    with pytest.raises(ct.PlacementError, match="does not fit into device memory"):
        placing.require_placeable([(str(n), fresh, record) for n in range(5)])


def test_a_memory_kind_that_the_device_lacks_is_refused():
    with pytest.raises(ct.PlacementError, match="a: device 0 has no memory of the kind 'pinned_host', only 'device'"):
        placing.require_placeable([("a", *make_template(Device(1000), 1, "pinned_host"))])
