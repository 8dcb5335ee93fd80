# SPDX-License-Identifier: Apache-2.0
"""Sharded states, another mesh on restore, and how much a device holds while leaves are replaced."""

import os
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import ckpttools as ct
from ckpttools.tree import write_back

from .round_trips import Iterator


class Stack(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.layers = nnx.List([nnx.Param(jax.random.normal(rngs(), (size,))) for size in (50_000, 200_000, 100_000)])


def test_while_restoring_the_device_holds_the_state_and_one_leaf(tmp_path, monkeypatch):
    spec = ct.CheckpointSpec(directory=tmp_path)
    with ct.open(spec) as ckpt:
        ckpt.save(1, {"model": Stack(nnx.Rngs(0))})
    model = Stack(nnx.Rngs(1))
    others = {id(array) for array in jax.live_arrays()} - {id(leaf) for leaf in jax.tree.leaves(nnx.state(model))}
    held = []
    real = jax.device_put

    def watch(value, *args):
        array = real(value, *args)
        held.append(sum(live.nbytes for live in jax.live_arrays() if id(live) not in others))
        return array

    monkeypatch.setattr(write_back.jax, "device_put", watch)
    with ct.open(spec) as ckpt:
        ckpt.restore({"model": model})
    assert len(held) == 3
    total, largest = 4 * 350_000, 4 * 200_000
    assert max(held) <= total + largest + 1000


_SHARDED = """
    import sys
    import jax, jax.numpy as jnp, numpy as np
    from flax import nnx
    from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
    import ckpttools as ct

    assert len(jax.devices()) == 8
    wide = Mesh(np.array(jax.devices()).reshape(4, 2), ("a", "b"))
    flat = Mesh(np.array(jax.devices()), ("x",))
    values = {"w": np.arange(64.0, dtype=np.float32).reshape(8, 8), "b": np.arange(8.0, dtype=np.float32)}
    key = jax.random.split(jax.random.key(7), 8)
    state = {"params": {
        "w": jax.device_put(values["w"], NamedSharding(wide, P("a", "b"))),
        "b": jax.device_put(values["b"], NamedSharding(wide, P())),
        "key": jax.device_put(key, NamedSharding(flat, P("x"))),
    }}
    spec = ct.CheckpointSpec(directory=sys.argv[1], keep=ct.All())
    with ct.open(spec) as ckpt:
        ckpt.save(1, state)
        ckpt.wait()
        onto = {
            "the mesh it had": jax.tree.map(lambda x: x.sharding, state["params"]),
            "another mesh": {"w": NamedSharding(flat, P(None, "x")), "b": NamedSharding(flat, P("x")),
                             "key": NamedSharding(flat, P())},
            "one device": dict.fromkeys(state["params"], jax.sharding.SingleDeviceSharding(jax.devices()[3])),
        }
        for name, shardings in onto.items():
            template = jax.tree.map(
                lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state["params"], shardings
            )
            restored = ckpt.restore({"params": template}).state["params"]
            for leaf in ("w", "b"):
                np.testing.assert_array_equal(restored[leaf], values[leaf])
            np.testing.assert_array_equal(jax.random.key_data(restored["key"]), jax.random.key_data(key))
            for leaf, sharding in shardings.items():
                assert restored[leaf].sharding.is_equivalent_to(sharding, restored[leaf].ndim), (name, leaf)
        # An array that was free to follow others stays free, so that it can meet sharded ones in one computation.
        loose = {"params": {**state["params"], "b": jnp.zeros(8)}}
        restored = ckpt.restore(loose).state["params"]
        assert not restored["b"].committed
        (restored["w"] + restored["b"]).block_until_ready()
    print("sharded ok")
"""


def test_a_sharded_state_is_restored_on_any_mesh_or_device(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(_SHARDED), str(tmp_path)],
        capture_output=True,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=8"},
        check=False,
    )
    assert "sharded ok" in done.stdout, done.stderr[-3000:]


def test_arrays_keep_their_freedom_and_their_type(tmp_path):
    spec = ct.CheckpointSpec(directory=tmp_path)
    state = {"params": {"free": jnp.ones(2), "tied": jax.device_put(jnp.ones(2), jax.devices()[0])}}
    with ct.open(spec) as ckpt:
        ckpt.save(1, state)
        restored = ckpt.restore(state).state["params"]
    assert restored["free"].committed == state["params"]["free"].committed
    assert restored["tied"].committed


def test_one_object_with_two_stored_values_is_refused_and_unchanged(tmp_path):
    one, other, shared = (Dense(value) for value in (1.0, 2.0, 0.0))
    spec = ct.CheckpointSpec(directory=tmp_path)
    with ct.open(spec) as ckpt:
        ckpt.save(1, {"a": one, "b": {"inner": other}})
        ckpt.save(2, {"a": one, "b": {"inner": one}})
    with ct.open(spec, validate=lambda state: state["a"].w[...]) as ckpt:
        with pytest.raises(ct.StructureError, match=r"a\.w and b\.inner\.w are one object") as caught:
            ckpt.restore({"a": shared, "b": {"inner": shared}}, step=1)
        assert "two objects" in caught.value.fix
        assert shared.w.get_raw_value().tolist() == [0.0, 0.0]
        assert ckpt.restore({"a": shared}, step=1).step == 1, "one of the two items alone"
        assert shared.w.get_raw_value().tolist() == [1.0, 1.0]
        report = ckpt.restore({"a": shared, "b": {"inner": shared}}, step=2)  # control: equal values
    assert (report.step, shared.w.get_raw_value().tolist()) == (2, [1.0, 1.0])


def test_one_iterator_with_two_stored_positions_is_refused(tmp_path):
    spec = ct.CheckpointSpec(directory=tmp_path)
    with ct.open(spec) as ckpt:
        ckpt.save(1, {"train": Iterator({"at": 1}), "eval": Iterator({"at": 2}), "count": 3})
    shared = Iterator({"at": 0})
    with pytest.raises(ct.StructureError, match="train and eval are one object"):
        ct.load(tmp_path, {"train": shared, "eval": shared})
    assert shared.state == {"at": 0}


class Dense(nnx.Module):
    def __init__(self, value: float) -> None:
        self.w = nnx.Param(jnp.full(2, value).at[0].set(value))
        self.nan = nnx.Variable(jnp.full(1, jnp.nan))
        self.key = nnx.Variable(jax.random.key(0))
        self.empty = nnx.Variable(jnp.zeros(0))
